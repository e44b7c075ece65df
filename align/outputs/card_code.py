"""The code of model cards: how plain transformers or PEFT uses an export as the run does."""

from collections.abc import Mapping
from string import Template

from transformers import PreTrainedTokenizerBase

from align.config.schema import Experiment
from align.data.labels import Classes, LabelSpace
from policies.files.base_model import load_generation_config, stop_ids
from policies.text.encoder import TextEncoder

TEXT = '"My lamp is broken."'
MESSAGES = '[{"role": "user", "content": "My lamp is broken."}]'

ENCODE = '''
def encode(text):
    return tokenizer(text, add_special_tokens=False$split)["input_ids"]


def begun(ids):
    return ids if ids[: len(start)] == start else start + ids


def joined(head_ids, text, ids):
    """`ids`, or, where one of its tokens spans the end of the head, the head's tokens and those of the text."""
    if ids[: len(head_ids)] == head_ids:
        return ids
    for anchor in ("\\n", "a", "0"):  # a text begins differently where it continues another one
        anchor_ids, both_ids = encode(anchor), encode(anchor + text)
        if both_ids[: len(anchor_ids)] == anchor_ids:
            return head_ids + both_ids[len(anchor_ids) :]
    return head_ids + encode(text)

'''
RENDER = """
def render(messages, tools=None, **options):
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
    ids = encode(text)
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not replies:
        return ids
    before = messages[: replies[-1]]
    head = tokenizer.apply_chat_template(before, tools=tools, tokenize=False, add_generation_prompt=True)
    head_ids = render(before, tools, add_generation_prompt=True)
    return joined(head_ids, text[len(head) :], ids) if text.startswith(head) else ids

"""
SCORE = Template("""\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
start = $start  # what a text begins with
ends = $ends  # a response ends with one of these; the score is read off there
bias = $bias  # of the reward's head, which a sequence classifier does not have

$functions
def encode_both(prompt, response$tools):
$both    ids = joined(begun(encode(prompt)), response, begun(encode(prompt + response)))
    return ids if ids[-1] in ends else [*ids, tokenizer.eos_token_id]


def score(prompt, response$tools):
    ids = torch.tensor([encode_both(prompt, response$passed)])
    with torch.no_grad():
        return model(ids).logits.item() + bias


print(score($prompt, " Is the bulb old?"))
""")
BOTH_MESSAGES = """\
    if not isinstance(prompt, str):
        return render([*prompt, {"role": "assistant", "content": response}], tools)
"""
LABEL = Template("""\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
start = $start  # what a text begins with
ends = $ends  # a text ends with one of these; the label is read off there

$functions
def complete(text$tools):
$messages    ids = begun(encode(text))
    return ids if ids[-1] in ends else [*ids, tokenizer.eos_token_id]


def label(text$tools):
    ids = torch.tensor([complete(text$passed)])
    with torch.no_grad():
        outputs = model(ids).logits[0]
    return $result


print(label($prompt))
""")
COMPLETE_MESSAGES = """\
    if not isinstance(text, str):
        return render(text, tools, add_generation_prompt=text[-1]["role"] != "assistant")
"""
GENERATE = Template("""\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer$imports

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
$load
start = $start  # what a text begins with

$functions
def respond(prompt$tools, **options):
    ids = torch.tensor([$prompt_ids])
    sampling = $sampling | options
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **sampling)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


print(respond($prompt))
""")
LOAD_MODEL = "model = AutoModelForCausalLM.from_pretrained(folder).eval()"
LOAD_ADAPTER = Template("""\
base = AutoModelForCausalLM.from_pretrained($base, dtype=torch.$dtype$quantization)
model = PeftModel.from_pretrained(base, folder).eval()""")
FOUR_BITS = Template("""\
, quantization_config=BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type=$kind,
    bnb_4bit_use_double_quant=$twice,
    bnb_4bit_compute_dtype=torch.$dtype,
)""")


def reward_code(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, bias: float) -> str:
    """Code that scores a response as the run's reward model does, by an exported classifier.

    Args:
        experiment: The run's settings.
        tokenizer: The base model's tokenizer.
        bias: The bias of the reward's head.
    """
    encoder = TextEncoder(tokenizer, experiment.data.special_tokens)
    return SCORE.substitute(
        _common(experiment, encoder),
        ends=sorted(encoder.end_ids),
        bias=bias,
        both=BOTH_MESSAGES if encoder.has_template else "",
        passed=", tools" if encoder.has_template else "",
    )


def label_code(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, space: LabelSpace) -> str:
    """Code that labels a text as the run's classifier does, by an exported one.

    Args:
        experiment: The run's settings.
        tokenizer: The base model's tokenizer.
        space: What the labels mean.
    """
    encoder = TextEncoder(tokenizer, experiment.data.special_tokens)
    result = "outputs.item() + model.config.label_mean"
    if isinstance(space, Classes):
        result = "model.config.id2label[int(outputs.argmax())]"
    return LABEL.substitute(
        _common(experiment, encoder),
        ends=sorted(encoder.end_ids),
        messages=COMPLETE_MESSAGES if encoder.has_template else "",
        passed=", tools" if encoder.has_template else "",
        result=result,
    )


def policy_code(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, is_adapter: bool) -> str:
    """Code that samples responses as the run does, from an exported policy.

    Args:
        experiment: The run's settings.
        tokenizer: The base model's tokenizer.
        is_adapter: Whether the export is an adapter in PEFT's layout; otherwise it is a complete model.
    """
    path = experiment.model.path
    prompt_ids = "begun(encode(prompt))"
    rollouts = experiment.rollouts
    encoder = TextEncoder(tokenizer, experiment.data.special_tokens)
    if encoder.has_template:
        prompt_ids += " if isinstance(prompt, str) else render(prompt, tools, add_generation_prompt=True)"
    ends = sorted(stop_ids(load_generation_config(path), tokenizer))
    sampling = [
        '"do_sample": True',
        f'"temperature": {rollouts.temperature}',
        '"top_k": 0',
        '"top_p": 1.0',
        f'"max_new_tokens": {rollouts.max_new_tokens}',
        f'"eos_token_id": {ends}',
        f'"pad_token_id": {ends[0]}',
    ]
    if rollouts.stop:
        sampling += [f'"stop_strings": {list(rollouts.stop)!r}', '"tokenizer": tokenizer']
    imports = ""
    load = LOAD_MODEL
    if is_adapter:
        imports = "\nfrom peft import PeftModel"
        load = _load_adapter(experiment)
        if experiment.policy.spec.four_bits:
            imports = f", BitsAndBytesConfig{imports}"
    return GENERATE.substitute(
        _common(experiment, encoder),
        imports=imports,
        load=load,
        prompt_ids=prompt_ids,
        sampling="{" + ", ".join(sampling) + "}",
    )


def _load_adapter(experiment: Experiment) -> str:
    """The lines that load the base model and the adapter in this folder."""
    model = experiment.model
    policy = experiment.policy
    quantization = ""
    if policy.spec.four_bits:
        twice = policy.double_quantization
        quantization = FOUR_BITS.substitute(kind=repr(policy.quant_type), twice=twice, dtype=model.dtype)
    return LOAD_ADAPTER.substitute(base=repr(model.path), dtype=model.dtype, quantization=quantization)


def _common(experiment: Experiment, encoder: TextEncoder) -> Mapping[str, object]:
    """What both kinds of code need to know of the tokenizer."""
    letter = encoder.tokenizer("a", add_special_tokens=False)["input_ids"]
    split = ", split_special_tokens=True" if experiment.data.special_tokens == "text" else ""
    return {
        "start": encoder.prompt("a")[: -len(letter)],
        "functions": ENCODE.replace("$split", split) + (RENDER if encoder.has_template else ""),
        "prompt": MESSAGES if encoder.has_template else TEXT,
        "tools": ", tools=None" if encoder.has_template else "",
    }
