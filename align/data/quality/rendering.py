"""Conversations that the model's chat template does not render."""

from align.data.quality.check import Flagged, flagged_by_reason
from align.data.quality.corpus import Corpus


def find_template_failures(corpus: Corpus) -> Flagged | None:
    """Rows on whose messages the chat template fails, or parts of which it drops."""
    assert corpus.lengths is not None  # renders each row
    reasons = {index: text for index, text in corpus.template_problems.items() if "template" in text}
    return flagged_by_reason(reasons, "not rendered by the chat template")
