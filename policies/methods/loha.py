"""LoHa: the change of each linear layer is the element-wise product of two low-rank matrices.

Hyeon-Woo et al. 2022, "FedPara: low-rank Hadamard product for communication-efficient federated learning"; as an
adapter Yeh et al. 2024, "Navigating text-to-image customization: from LyCORIS fine-tuning to model evaluation".
"""

from policies.method_spec import MethodSpec

SPEC = MethodSpec(
    name="loha",
    trains="two low-rank matrices beside linear layers, multiplied element by element",
    source="Hyeon-Woo et al. 2022; Yeh et al. 2024",
    trunk="policies.methods.loha_trunk:LohaTrunk",
    reads=("rank", "alpha", "targets"),
    peft_type="LOHA",
    peft_config="policies.methods.loha_trunk:saved_loha_config",
    saved_settings={"rank": "r", "alpha": "alpha"},
    below_float32=True,
    merges_at_export=True,
)
