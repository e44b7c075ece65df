"""Prompts and responses in the variety of a real data set, the same for the same seed."""

import random
import re

WORDS = {
    "thing": (
        "sourdough starter;bicycle chain;cover letter;kitchen tap;spreadsheet;garden fence;guitar string;wool jumper;"
        "tax return;phone screen;wooden floor;fish tank;rain barrel;coffee grinder;tent zip;laptop battery;"
        "front door lock;tomato plant;sewing machine;camera lens;bookshelf;electric scooter;water heater;diary"
    ),
    "problem": (
        "keeps slipping;smells of vinegar;makes a grinding noise;will not close properly;looks worn after a year;"
        "leaks when it rains;stopped working overnight;has yellow spots;takes far too long;got wet on holiday;"
        "is older than I am;wobbles on one side;came without instructions;freezes every morning;turned grey"
    ),
    "concept": (
        "photosynthesis;compound interest;gradient descent;the water cycle;plate tectonics;habeas corpus;recursion;"
        "herd immunity;the offside rule;inflation;natural selection;a database index;the placebo effect;osmosis;"
        "double-entry bookkeeping;public-key encryption;the subjunctive mood;supply and demand;entropy;a mortgage"
    ),
    "person": (
        "Amara;Benedikt;Chiara;Dmitri;Esperança;Farouk;Grace;Hélène;Ines;Jorge;Keiko;Łukasz;Mei;Noor;O'Brien;Priya;"
        "Quentin;Rosa;Søren;Tadeusz;Uma;Vikram;Wanda;Ximena;Yusuf;Zoë"
    ),
    "place": (
        "Lisbon;the old harbour;a small village near Graz;Nairobi;the library;Osaka;the allotment;my grandmother's "
        "kitchen;Reykjavík;the night train;São Paulo;a quiet beach;the school canteen;Glasgow;the workshop;Quito"
    ),
    "audience": (
        "a ten-year-old;my manager;new colleagues;readers of a local paper;a sceptical friend;first-year students;"
        "my landlord;people who hate mornings;an aunt who knits;a job interview;beginners;the whole team"
    ),
    "form": (
        "short poem;polite email;product description;limerick;eulogy;toast;press release;haiku;complaint;dialogue;"
        "horror story;review;speech;recipe;job advertisement;riddle;letter;bedtime story"
    ),
    "topic": (
        "rain on a tin roof;the last bus home;bees in the city;a lost umbrella;learning to swim late;second-hand books;"
        "moving abroad;an argument about dishes;working from home;the first frost;a cat called Biscuit;quiet trains;"
        "running a marathon;grandparents and computers;cheap wine;a broken clock;fasting;street markets;night shifts"
    ),
    "item": (
        "apples;marbles;tickets;pencils;eggs;stamps;cupcakes;chairs;notebooks;seedlings;postcards;tyres;candles;"
        "buttons;bricks;oranges;batteries;loaves of bread"
    ),
    "adjective": (
        "cheap;reliable;surprising;gentle;loud;modern;fragile;generous;dull;honest;tidy;bitter;ambitious;careful;"
        "slow;elegant;practical;risky;familiar;bright"
    ),
    "noun": (
        "budget;kettle;neighbour;timetable;bridge;committee;harvest;password;mirror;orchestra;contract;blanket;engine;"
        "recipe;garden;signature;ladder;festival;experiment;window;mountain;argument;lecture;market;compass;curtain;"
        "meeting;pharmacy;river;teacher;umbrella;violin;warehouse;island;notebook;helmet;receipt;bakery;candle;island"
    ),
    "verb": (
        "measure;clean;replace;describe;compare;borrow;repair;count;paint;test;rewrite;explain;store;weigh;follow;"
        "check;sort;cancel;deliver;improve;sketch;warm;translate;protect"
    ),
    "adverb": "slowly;twice;in the evening;by hand;before lunch;with care;once a week;without hurry;in pairs;outdoors",
    "time": (
        "in spring;after the war;on Tuesdays;within a fortnight;every autumn;at dawn;since 1987;over the weekend;"
        "in the nineteenth century;before the deadline;during the holidays;for about an hour"
    ),
    "reason": (
        "the surface dries unevenly;most people overlook the small print;it costs less than a new one;"
        "heat makes the metal expand;nobody had asked the tenants;the evidence is thin;the roots need air;"
        "two of the three samples were mislabelled;it keeps the flavour;the rules changed that year;"
        "light travels faster than sound;a second opinion is free"
    ),
    "language": "French;Polish;Japanese;Swahili;Portuguese;plain English;Latin;Turkish",
}
CHOICES = {name: words.split(";") for name, words in WORDS.items()}

PROMPTS = (
    "How do I {verb} a {thing} that {problem}?",
    "My {thing} {problem}. {person} says I should {verb} it {adverb}. Is that right?",
    "Explain {concept} to {audience} in {n} words, please.",
    "{person} asks {audience} {time}: what is the difference between {concept} and {concept}?",
    "Write a {form} about {topic} for {audience} with a {noun} and a {noun}.",
    "write me a {adjective} {form}, {topic}, max {n} words",
    "{person} buys {n} {item} and gives {m} of them to {person} {time}. How many {item} are left?",
    'Translate into {language}: "The {noun} in {place} was more {adjective} than the {noun}."',
    "I am going to {place} {time} with {person}. What should I pack besides a {noun} and a {noun}?",
    "Give me {n} ideas for {topic}; they should be {adjective} and fit {audience}.",
    'Can you {verb} this sentence?\n\n"The {adjective} {noun} {problem}, so {person} had to {verb} the {noun}."',
    "why does my {noun} need a {noun}?? the {thing} {problem}",
    "Which is more {adjective}, a {noun} or a {noun}, when you live near {place}?",
    "You are {person}, who sells {item} in {place}. Persuade me to buy {n}.",
    "Summarise in one line:\n\n{sentence} {sentence} {sentence}",
    "What happened in {place} {time}, and why did {n} {item} matter for {concept}?",
    "def {verb}_{noun}(x): how would I test that it can {verb} {n} {item}?",
    "What is {n} × {n}?",
    "What is {n} × {n} + {m}? Reply with the number alone.",
    "Is it rude to {verb} a {noun} at a {noun}? {person} did it {time}.",
)
SENTENCES = (
    "Start with the {noun}, then {verb} the {noun} {adverb}.",
    "In {place}, the {noun} was always more {adjective} than people expected.",
    "{person} would disagree, because {reason}.",
    "That said, a {adjective} {noun} can {verb} almost anything {time}.",
    "You will need {n} {item}, a {adjective} {noun} and some patience.",
    "The short answer is yes, although {reason}.",
    "There is no need to {verb} it {adverb}; {reason}.",
    "Think of {concept} as a {noun} that somebody left in {place}.",
    "It helps to {verb} the {noun} first and to {verb} the {noun} {time}.",
    "Historians in {place} still argue about the {adjective} {noun}.",
    "If your {thing} {problem}, do not {verb} it {adverb}.",
    "“Never {verb} a {noun},” {person} used to say, “unless {reason}.”",
    "Both the {noun} and the {noun} are {adjective}, but only one of them is {adjective}.",
    "I would ask {person} about the {noun}, since {reason}.",
    "Roughly {n} % of the {item} came from {place} {time}.",
    "Another way to look at it: {concept} and {concept} have a {noun} in common.",
    "Why does this matter? Because {reason}!",
    "Be {adjective}, be {adjective}, and {verb} the {noun} {adverb}.",
    "The {noun} costs €{n}.50 (about £{m}), which is {adjective} for {place}.",
    "Dr. {person} wrote {time} that every {noun} hides a {adjective} {noun}.",
    "Finally, {verb} everything {adverb} and let the {noun} rest until {person} comes back.",
    "For {audience}, I'd leave out the {noun} and talk about {topic} instead.",
    "A {adjective} {noun} beside a {adjective} {noun} is a sign of {topic}.",
    "They {verb} {item} in {place}, {verb} them {adverb}, and sell {n} {time}.",
)
OPENINGS = ("", "", "", "", "Sure! ", "Good question. ", "Of course, {person}. ", "Honestly? ", "Well, it depends. ")
SHORT = ("Yes, but only {adverb}.", "{person}, at the {noun}.", "No {noun} can do that!", "About {n} {item}")
FOREIGN = {
    "de": (
        "Wie putze ich am besten {n} {item} in {place}?;Was heißt „{noun}“ auf Deutsch? {person} fragt {m}-mal.",
        "Zuerst würde ich die Tür öffnen und gründlich lüften.;Das kostet ungefähr {n} Euro.;{person} weiß es besser.;"
        "Übrigens ist Größe nicht alles.;Fragen Sie in {place} nach.;Danach bleibt nur noch, alles zu prüfen.",
    ),
    "fr": (
        "Où puis-je trouver {n} œufs à {place} ?;Écris une phrase sur la forêt pour {person} et {person} en {n} mots.",
        "À mon avis, c’est une très bonne idée !;L’été dernier, {person} en a acheté {n}.;Ça dépend de la météo.;"
        "Le garçon a mangé un gâteau à {place}.;N’oubliez pas le cœur du problème.;Voilà : il n’y a plus rien à faire.",
    ),
    "pt": (
        "Onde fica {place}, e a {n} quilómetros de {person}?;ESCREVA {n} LINHAS SOBRE {person} E A EDUCAÇÃO",
        "A população não sabe a razão.;SÃO {n} REAIS, SEM EXCEÇÃO.;{person} prefere maçã e pão.;Ânimo, amanhã há mais.;"
        "Às vezes é melhor esperar.;A estação fecha às {n} horas.",
    ),
    "zh": (
        "请问{place}的红烧肉怎么做？要{n}克。;用一句话介绍{person}，写给{person}，不超过{n}字。",
        "首先把水烧开，再放入{n}克盐。;这个问题没有标准答案。;{person}去年去过那里。;价格大约是{n}元。;希望对你有帮助！;然后等十分钟左右。",
    ),
    "ru": (
        "Как приготовить {n} пельменей для {person}?;Расскажи {person} {n} фактов про метро в {place}.",
        "Сначала нужно подождать {n} минут.;Это вовсе не обязательно.;{person} так и делает.;Потом всё перемешать.;"
        "В итоге получится совсем неплохо.;Ёлка стояла у окна.",
    ),
    "hi": (
        "{place} में {n} किताबें कहाँ मिलेंगी?;{person} के लिए {person} पर {n} वाक्य लिखो।",
        "पहले पानी को {n} मिनट उबालें।;यह बहुत आसान है।;क्‍या आपने {person} से पूछा?;बाद में सब मिला दें।;ज़्यादा नमक मत डालें।",
    ),
    "fa": (
        "چگونه {n} نان برای {person} درست کنم؟;{person} درباره‌ی {place} در {n} کلمه چه می‌گوید؟",
        "ابتدا آب را گرم می‌کنیم.;این کار {n} دقیقه طول می‌کشد.;{person} نمی‌داند.;"
        "کتاب‌ها روی میز است.;بعد از آن صبر کنید.",
    ),
}
"""Questions and sentences; Hindi and Persian spell words with joiners, which are no fault."""
EMOJI = ("🙂", "👩‍🔬", "🎉", "❤️", "👨‍👩‍👧", "🇵🇹", "👍🏽", "✔️")
CODE = (
    "```python\ndef {verb}(items):\n\treturn sorted(items, key=len)[:{n}]\n```",
    "```sql\nSELECT {noun}, COUNT(*) FROM {noun}s WHERE {noun} < {n} GROUP BY 1\n```",
    '```sh\ngrep -rn "{noun}" ./{noun} | sort -u | head -{n}\n```',
    '```html\n<div class="{noun}"><b>{noun}</b> &amp; {noun}</div>\n```',
)


class TextWriter:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def fill(self, template: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: self._word(match[1]), template)

    def _word(self, name: str) -> str:
        if name == "n":
            return str(self.rng.randint(12, 999))
        if name == "m":
            return str(self.rng.randint(2, 11))
        if name == "sentence":
            return self.sentence()
        return self.rng.choice(CHOICES[name])

    def sentence(self) -> str:
        return self.fill(self.rng.choice(SENTENCES))

    def prompt(self) -> str:
        return self.fill(self.rng.choice(PROMPTS))

    def sentences(self, count: int) -> str:
        return " ".join(self.sentence() for _ in range(count))

    def response(self) -> str:
        """A few words to some twenty sentences; some end in a list, code, an emoji, a link or a signature."""
        if self.rng.random() < 0.02:
            return self.fill(self.rng.choice(SHORT))
        count = min(20, max(1, round(self.rng.lognormvariate(1.2, 0.6))))
        text = self.fill(self.rng.choice(OPENINGS)) + self.sentences(count)
        shape = self.rng.random()
        if shape < 0.04:
            return text + "\n\n" + self.fill(self.rng.choice(CODE))
        if shape < 0.07:
            return text + "\n\n" + "\n".join(self.fill("* {adjective} {noun}: {n} {item}") for _ in range(3))
        if shape < 0.10:
            return text + " " + self.rng.choice(EMOJI)
        if shape < 0.12:
            return text + self.fill("\n\nBest regards,\n{person}")
        if shape < 0.13:
            return text + self.fill(" See https://example.org/{noun}/{n}")
        if shape < 0.20:
            halfway = self.sentences(2)
            return text + "\r\n\r\n" + halfway if shape < 0.14 else text + "\n\n" + halfway
        return text

    def exchange(self) -> tuple[str, str]:
        """A prompt and a response to it; some are in another language."""
        prompt, (response,) = self.question(1)
        return prompt, response

    def question(self, responses: int) -> tuple[str, list[str]]:
        """A prompt and several different responses to it."""
        language = self.rng.choice(list(FOREIGN)) if self.rng.random() < 0.08 else None
        prompt = self.fill(self.rng.choice(FOREIGN[language][0].split(";"))) if language else self.prompt()
        different: dict[str, None] = {}
        while len(different) < responses:
            different[self._foreign_response(language) if language else self.response()] = None
        return prompt, list(different)

    def _foreign_response(self, language: str) -> str:
        answers = FOREIGN[language][1].split(";")
        chosen = self.rng.sample(answers, self.rng.randint(2, 5))
        return self.fill(("" if language == "zh" else " ").join(chosen))
