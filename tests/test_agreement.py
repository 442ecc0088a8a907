"""Errors are measured by norms, and what is missing, misshapen or not a number never agrees."""

from __future__ import annotations

import json

import numpy as np
import pytest

from metafast.verification.agreement import Answer, agreement


def test_agreement_measures_norms() -> None:
    oracle = np.array([3.0, 4.0]), {"a": np.array([3.0, 0.0]), "b": np.array([0.0, 4.0])}
    found = agreement((np.array([3.0, 4.5]), {"a": np.array([3.0, 0.3]), "b": np.array([0.0, 4.0])}), oracle)
    assert found.losses == pytest.approx(0.1)
    assert found.gradient == pytest.approx(0.06)
    assert (found.parameter, found.parameter_error) == ("a", pytest.approx(0.1))
    assert not found.agrees
    assert agreement(oracle, oracle).agrees


@pytest.mark.parametrize(
    "wrong",
    [
        (np.ones(2), {"a": np.ones(3)}),
        (np.ones(2), {"a": np.ones(3), "b": np.full(2, np.nan)}),
        (np.ones(2), {"a": np.ones(3), "b": np.ones(1)}),
        (np.ones(2), {"a": np.ones(3), "b": np.ones(2), "c": np.ones(2)}),
        (np.ones(1), {"a": np.ones(3), "b": np.ones(2)}),
        (np.full(2, np.nan), {"a": np.ones(3), "b": np.ones(2)}),
    ],
    ids=["missing parameter", "nan", "shape", "additional parameter", "losses shape", "nan losses"],
)
def test_agreement_is_not_fooled(wrong: Answer) -> None:
    oracle = np.ones(2), {"a": np.ones(3), "b": np.ones(2)}
    found = agreement(wrong, oracle)
    assert not found.agrees
    json.dumps(found.to_json(), allow_nan=False)
