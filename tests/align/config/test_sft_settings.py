import pytest

from align.config.schema import SftSettings


def test_an_adapter_is_for_the_original_base_unless_the_settings_say_otherwise() -> None:
    assert not SftSettings(adapter="a").residual_base
    assert SftSettings(adapter="a", adapter_base="residual").residual_base


def test_a_base_of_no_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="set adapter, or remove adapter_base"):
        SftSettings(adapter_base="residual")
