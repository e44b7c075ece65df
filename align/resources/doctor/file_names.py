"""Checks the names of the user's files."""

from align.resources.doctor.finding import Finding, ok, problem_in_words
from align.runtime.shadowing import hidden_package, package_hidden_from_workers


def check_file_names() -> Finding:
    """Whether a file hides one of align's packages, from this process or from Ray's workers."""
    message = hidden_package() or package_hidden_from_workers()
    if message:
        return problem_in_words(message, "rename the file")
    return ok("no file hides a package of align")
