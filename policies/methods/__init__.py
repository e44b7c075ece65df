"""Adaptation methods: each is a file that assigns a `MethodSpec` to `SPEC`, and the trunk that the spec names.

To add `my_method`, write `my_method.py`, whose `SPEC` has the name of the file (see `policies/method_spec.py`), and
`my_method_trunk.py` with a subclass of one of these:

* `PartialTrunk` in `partial_trunk.py`: trains some of the base's own parameters, as BitFit does;
* `LayerAdapterTrunk` or `PeftTrunk` in `layer_adapter_trunk.py`: puts an adapter into the base's layers, as LoRA does;
* `LinearAdapterTrunk` in `linear_adapter_trunk.py`: puts one of PEFT's adapters on linear layers, as VeRA does;
* `SoftPromptTrunk` in `soft_prompt_trunk.py`: trains virtual tokens before the prompt;
* `Trunk` in `policies/trunk.py`: anything else.

`feature.py` with `feature_trunk.py` is the shortest example. The registry finds the file; nothing else needs an edit.
"""
