"""Terms of a reward: one file for each kind, with its settings, its checks and its scorer.

To add a kind, write a file with a subclass of `TermSettings` (`rewards/terms/base.py`) that has a field
`kind: Literal["NAME"]`; the registry finds it, and `kind: NAME` is valid under `reward.terms`. Subclass

* `TextTermSettings` to score texts by a function: `regex.py`;
* `ChildSettings` for a function that may hang or harm, which runs in processes of its own: `math.py`;
* `HttpSettings` in `rewards/http.py` for a service: `endpoint.py`;
* `TermSettings` for anything else, such as lengths or the reward model's outputs: `length.py`.
"""
