"""Valid JSON, optionally under a schema, as a term."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from policies.schema import Settings
from rewards.terms.base import TextTermSettings
from rewards.terms.score_functions import score_each
from rewards.user_functions import ScoreFunction


class JsonTerm(TextTermSettings):
    """1 where the response is JSON, valid under `schema` where there is one, else 0."""

    kind: Literal["json"]
    schema_: dict[str, Any] | str | None = Field(
        None, alias="schema", description="a JSON schema, or a file that contains one"
    )

    model_config = Settings.model_config | {"serialize_by_alias": True}

    @field_validator("schema_")
    @classmethod
    def _is_a_schema(cls, schema: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for

        if schema is None:
            return None
        try:
            loaded = _load(schema)
            if not isinstance(loaded, dict) or not isinstance(loaded.get("$schema", ""), str):
                raise ValueError("an object was expected, with text in $schema if it has one")
            validator_for(loaded).check_schema(loaded)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{schema} cannot be read: {error}") from None
        except SchemaError as error:
            raise ValueError(f"not a JSON schema: {error.message}") from None
        return schema

    @property
    def is_verifiable(self) -> bool:
        """Yes."""
        return True

    def make_function(self, name: str) -> ScoreFunction:
        """A function that validates responses."""
        from jsonschema.validators import validator_for
        from referencing import Registry

        schema = None if self.schema_ is None else _load(self.schema_)
        # With an empty registry nothing is fetched: by default a $ref is resolved over the network.
        validator = None if schema is None else validator_for(schema)(schema, registry=Registry())

        def is_valid(response: str) -> bool:
            try:
                value = json.loads(response)
            except (ValueError, RecursionError):
                return False
            return validator is None or bool(validator.is_valid(value))

        return score_each(lambda response: float(is_valid(response)))


def _load(schema: dict[str, Any] | str) -> Any:
    return json.loads(Path(schema).read_text(encoding="utf-8")) if isinstance(schema, str) else schema
