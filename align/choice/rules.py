"""The rules by which a technique is chosen: one table, which docs/choose.md shows.

`python -m align.choice.rules` prints the table of docs/choose.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from align.choice import recipes
from align.choice.facts import ROW_KINDS, TASKS, Facts, TaskName
from align.choice.recipes import Recipe
from policies.errors import UserError
from policies.method_tables import markdown

Technique = Literal[
    "prompting",
    "retrieval",
    "soft prompt",
    "PEFT",
    "full fine-tuning",
    "continued pre-training",
    "classification head",
    "preference optimisation",
    "RLHF",
]

FEW_PER_CLASS = 16
FEW_LABELS = 1_000
FEW_DEMONSTRATIONS = 32
SOME_DEMONSTRATIONS = 1_000
MANY_DEMONSTRATIONS = 100_000
LARGE_MODEL = 10_000_000_000
MANY_TOKENS = 10_000_000
FEW_COMPARISONS = 100
ENOUGH_COMPARISONS = 2_000


@dataclass(frozen=True)
class ChoiceRule:
    """When a technique fits, and why.

    Attributes:
        task: The task that it is for.
        when: Its condition in words.
        applies: Its condition.
        technique: What fits.
        why: The reason.
        source: The papers that the reason is from.
        recipe: The experiment to start with.
        compares: Whether the experiment is an alternative to compare with, as the technique itself trains nothing.
    """

    task: TaskName
    when: str
    applies: Callable[[Facts], bool]
    technique: Technique
    why: str
    source: str
    recipe: Recipe
    compares: bool = False


CHOICE_RULES = (
    ChoiceRule(
        "classify",
        when=f"fewer than {FEW_PER_CLASS} labelled texts per class",
        applies=lambda facts: 0 < facts.labels_per_class < FEW_PER_CLASS,
        technique="prompting",
        why=f"with {FEW_PER_CLASS} texts per class, training a new head is far behind methods with a prompt, "
        "which is worth hundreds of labels",
        source="Gao, Fisch and Chen 2021, arXiv:2012.15723; Le Scao and Rush 2021, arXiv:2103.08493",
        recipe=recipes.LINEAR_PROBE,
        compares=True,
    ),
    ChoiceRule(
        "classify",
        when=f"fewer than {FEW_LABELS:,} labelled texts",
        applies=lambda facts: 0 < facts.count("labels") < FEW_LABELS,
        technique="classification head",
        why="a linear head on frozen states costs one forward pass per text, and is mostly about as good as "
        "fine-tuning",
        source="Peters, Ruder and Smith 2019, arXiv:1903.05987",
        recipe=recipes.LINEAR_PROBE,
    ),
    ChoiceRule(
        "classify",
        when="more labelled texts",
        applies=lambda facts: facts.count("labels") > 0,
        technique="classification head",
        why="a head with adapters comes within half a point of full fine-tuning on GLUE, with a few per cent of the "
        "parameters",
        source="Houlsby et al. 2019, arXiv:1902.00751",
        recipe=recipes.ADAPTED_CLASSIFIER,
    ),
    ChoiceRule(
        "respond",
        when=f"fewer than {FEW_DEMONSTRATIONS} demonstrations",
        applies=lambda facts: 0 < facts.count("demonstrations") < FEW_DEMONSTRATIONS,
        technique="prompting",
        why="so few demonstrations fit into the context, from which a model learns without training",
        source="Brown et al. 2020, arXiv:2005.14165",
        recipe=recipes.SOFT_PROMPT,
        compares=True,
    ),
    ChoiceRule(
        "respond",
        when=f"fewer than {SOME_DEMONSTRATIONS:,} demonstrations, and a model of {LARGE_MODEL / 1e9:g} B parameters or "
        "more",
        applies=lambda facts: (
            0 < facts.count("demonstrations") < SOME_DEMONSTRATIONS and facts.parameters >= LARGE_MODEL
        ),
        technique="soft prompt",
        why="in models of this size a trained prompt is as good as training all weights; in smaller ones it is behind",
        source="Lester, Al-Rfou and Constant 2021, arXiv:2104.08691",
        recipe=recipes.SOFT_PROMPT,
    ),
    ChoiceRule(
        "respond",
        when=f"{MANY_DEMONSTRATIONS:,} demonstrations or more, and memory to train all weights",
        applies=lambda facts: facts.count("demonstrations") >= MANY_DEMONSTRATIONS and facts.full_fits,
        technique="full fine-tuning",
        why="on large data low-rank adapters learn less than all weights do, though they also forget less",
        source="Biderman et al. 2024, arXiv:2405.09673",
        recipe=recipes.FULL,
    ),
    ChoiceRule(
        "respond",
        when="other demonstrations",
        applies=lambda facts: facts.count("demonstrations") > 0,
        technique="PEFT",
        why="LoRA is about as good as full fine-tuning here, and a thousand good demonstrations can suffice; in four "
        "bits it takes the least memory",
        source="Hu et al. 2021, arXiv:2106.09685; Zhou et al. 2023, arXiv:2305.11206; Dettmers et al. 2023, "
        "arXiv:2305.14314",
        recipe=recipes.ADAPTER,
    ),
    ChoiceRule(
        "facts",
        when="plain texts that hold the facts",
        applies=lambda facts: facts.count("texts") > 0,
        technique="retrieval",
        why="passages put into the prompt teach facts better than training on the same texts does, and an index can "
        "be changed without training",
        source="Ovadia et al. 2023, arXiv:2312.05934; Lewis et al. 2020, arXiv:2005.11401",
        recipe=recipes.TEXT_ADAPTER,
        compares=True,
    ),
    ChoiceRule(
        "facts",
        when="questions with their answers alone",
        applies=lambda facts: facts.count("demonstrations") > 0,
        technique="retrieval",
        why="fine-tuning teaches new facts slowly, and a model that has learned them so invents others more often",
        source="Gekhman et al. 2024, arXiv:2405.05904",
        recipe=recipes.ADAPTER,
        compares=True,
    ),
    ChoiceRule(
        "domain",
        when=f"plain texts of {MANY_TOKENS / 1e6:g} M tokens or more, and memory to train all weights",
        applies=lambda facts: facts.text_tokens >= MANY_TOKENS and facts.full_fits,
        technique="continued pre-training",
        why="a second phase of pre-training on the texts of a field helps with its tasks, and in such training "
        "low-rank adapters learn less than all weights do",
        source="Gururangan et al. 2020, arXiv:2004.10964; Biderman et al. 2024, arXiv:2405.09673",
        recipe=recipes.FULL_TEXT,
    ),
    ChoiceRule(
        "domain",
        when="other plain texts",
        applies=lambda facts: facts.count("texts") > 0,
        technique="continued pre-training",
        why="a second phase of pre-training helps on small collections of texts, too; by LoRA it forgets less of what "
        "the model knew",
        source="Gururangan et al. 2020, arXiv:2004.10964; Biderman et al. 2024, arXiv:2405.09673",
        recipe=recipes.TEXT_ADAPTER,
    ),
    ChoiceRule(
        "prefer",
        when="prompts with answers that a program can check",
        applies=lambda facts: facts.count("answers") > 0,
        technique="RLHF",
        why="a check is a reward that needs no reward model; GRPO needs no critic either",
        source="Shao et al. 2024, arXiv:2402.03300; Lambert et al. 2024, arXiv:2411.15124",
        recipe=recipes.CHECKED,
    ),
    ChoiceRule(
        "prefer",
        when=f"fewer than {FEW_COMPARISONS} comparisons",
        applies=lambda facts: 0 < facts.count("preferences") < FEW_COMPARISONS,
        technique="prompting",
        why="a system prompt with a few good responses brings even a base model close to one that is tuned",
        source="Lin et al. 2023, arXiv:2312.01552",
        recipe=recipes.DPO_PAIRS,
        compares=True,
    ),
    ChoiceRule(
        "prefer",
        when=f"{ENOUGH_COMPARISONS:,} comparisons or more, prompts besides, and memory for a reward model and PPO",
        applies=lambda facts: (
            facts.count("preferences") >= ENOUGH_COMPARISONS and facts.count("prompts") > 0 and facts.rlhf_fits
        ),
        technique="RLHF",
        why="on the same comparisons PPO ends somewhat above DPO, and it uses prompts without responses; with fewer "
        f"than {ENOUGH_COMPARISONS:,} a reward model is hardly better than chance",
        source="Ivison et al. 2024, arXiv:2406.09279; Gao, Schulman and Hilton 2022, arXiv:2210.10760",
        recipe=recipes.RLHF,
    ),
    ChoiceRule(
        "prefer",
        when="other comparisons",
        applies=lambda facts: facts.count("preferences") > 0,
        technique="preference optimisation",
        why="DPO trains on comparisons directly, as SFT does: without a reward model and without sampling",
        source="Rafailov et al. 2023, arXiv:2305.18290",
        recipe=recipes.DPO_PAIRS,
    ),
    ChoiceRule(
        "prefer",
        when="responses rated 0 or 1",
        applies=lambda facts: facts.count("verdicts") > 0,
        technique="preference optimisation",
        why="KTO needs no pairs: it learns from responses that are good or bad by themselves",
        source="Ethayarajh et al. 2024, arXiv:2402.01306",
        recipe=recipes.KTO,
    ),
    ChoiceRule(
        "prefer",
        when="responses rated on a scale",
        applies=lambda facts: facts.count("ratings") > 0,
        technique="RLHF",
        why="a reward model learns ratings by regression, which comparisons would reduce to an order",
        source="Wang et al. 2024, arXiv:2406.08673",
        recipe=recipes.RATED_RLHF,
    ),
)
"""All rules; of those of a task, the first that applies counts."""


def choose_rule(facts: Facts) -> ChoiceRule:
    """The first rule of the task that applies.

    Raises UserError where none does, because the data has no rows that the task needs.
    """
    own = rules_of(facts.task)
    for rule in own:
        if rule.applies(facts):
            return rule
    found = [f"{count:,} {ROW_KINDS[kind]}" for kind, count in facts.rows.items() if count]
    raise UserError(
        f"--task {facts.task} ({TASKS[facts.task]}): the data has {', '.join(found) or 'no rows'}; expected one of: "
        f"{'; '.join(rule.when for rule in own)}"
    )


def rules_of(task: TaskName) -> list[ChoiceRule]:
    """The rules of a task, in order."""
    return [rule for rule in CHOICE_RULES if rule.task == task]


def rules_table(rules: Sequence[ChoiceRule] = CHOICE_RULES) -> str:
    """The rules as a table in Markdown."""
    table: list[tuple[str, ...]] = [("task", "data and machine", "technique", "why", "source", "experiment")]
    for rule in rules:
        cells = (f"`{rule.task}`", rule.when, f"**{rule.technique}**", rule.why, rule.source, _experiment(rule))
        table.append(cells)
    return markdown(table)


def _experiment(rule: ChoiceRule) -> str:
    """The stages and the method of a rule's experiment."""
    recipe = rule.recipe
    stages = ", ".join(f"`{stage}`" for stage in recipe.stages)
    methods = " or ".join(f"`{method}`" for method in recipe.methods)
    text = f"{stages} with {methods}"
    return f"to compare with: {text}" if rule.compares else text


if __name__ == "__main__":
    print(rules_table())
