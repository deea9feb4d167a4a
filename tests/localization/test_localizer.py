"""Localisers by name, as users write them."""

import pytest

from lightning_nrl import RegressionFreeRepair, SearchOptions
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.localization import LOCALIZERS, AllWeights, Localizer, NeuRecoverLite


@pytest.mark.parametrize(
    ("name", "localizer"), [("neurecover-lite", NeuRecoverLite()), ("all", AllWeights())], ids=["lite", "all"]
)
def test_a_name_stands_for_a_localizer_with_its_default_settings(name: str, localizer: Localizer) -> None:
    assert isinstance(localizer, Localizer)
    assert LOCALIZERS.parse("localizer", name) == localizer
    assert SearchOptions(localizer=name).localizer == localizer
    assert RegressionFreeRepair(search=SearchOptions(localizer=name)).settings.localizer == localizer


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("neurecover-light", "did you mean 'neurecover-lite'"),
        (AllWeights, "is no Localizer"),
        (len, "is no Localizer"),
        (None, "is no Localizer"),
    ],
)
def test_what_is_no_localizer_is_refused(wrong: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LOCALIZERS.parse("localizer", wrong)
