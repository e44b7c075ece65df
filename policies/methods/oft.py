"""OFT: blocks of the inputs of linear layers are rotated.

Qiu et al. 2023, "Controlling text-to-image diffusion by orthogonal finetuning", with the rotation on the inputs as in
Qiu et al. 2025, "Orthogonal finetuning made scalable".
"""

from policies.method_spec import MethodSpec

SPEC = MethodSpec(
    name="oft",
    trains="rotations of blocks of the inputs of linear layers",
    source="Qiu et al. 2023; Qiu et al. 2025",
    trunk="policies.methods.oft_trunk:OftTrunk",
    reads=("block_size", "targets"),
    peft_type="OFT",
    peft_config="policies.methods.oft_trunk:saved_oft_config",
    saved_settings={"block_size": "oft_block_size"},
    below_float32=True,
    merges_at_export=True,
)
