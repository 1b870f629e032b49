from __future__ import annotations

import json

from dipaco.asking import StatusSource, plain


def test_what_is_not_a_number_becomes_null() -> None:
    status = {"losses": {"0.0": float("nan")}, "workers": [{"loss": float("inf"), "steps": 3}], "eta_s": 1.5}
    assert plain(status) == {"losses": {"0.0": None}, "workers": [{"loss": None, "steps": 3}], "eta_s": 1.5}
    json.dumps(plain(status), allow_nan=False)


def test_nobody_there_is_no_status_and_no_error() -> None:
    with StatusSource() as source:
        assert source.ask("127.0.0.1:1") is None
