"""What a response is scored by: one file per kind of term, each with its settings, its checks and its scorer.

A file that defines a subclass of `TermSettings` with a field `kind: Literal["NAME"]` makes `kind: NAME` valid under
`reward.terms`; the registry finds it, and nothing else has to be edited.
"""
