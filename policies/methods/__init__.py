"""Adaptation methods: one file per method that describes it (`SPEC`), and the trunks that train them (`*_trunk.py`)."""
