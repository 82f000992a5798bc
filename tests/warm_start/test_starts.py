"""Which warm starts a router can have."""

import pytest

from nexus_ds.errors import ConfigError
from nexus_ds.warm_start.starts import check_start


@pytest.mark.parametrize(
    ("start", "kind", "form", "message"),
    [
        (
            "ridge",
            "nexus",
            "swiglu",
            "warm_start ridge sets free rows, but this router's rows are P",
        ),
        ("hidden_mean", "nexus", "linear", "warm_start hidden_mean sets free rows"),
        ("embedding", "nexus", "swiglu", "warm_start embedding sets free rows"),
        (
            "chunks",
            "linear",
            "swiglu",
            "warm_start chunks fits P, but this router has free rows; use label_fit",
        ),
        ("closed_form", "linear", "linear", "warm_start closed_form fits P"),
        (
            "closed_form",
            "nexus",
            "swiglu",
            "closed_form needs a linear P, this one is swiglu; use chunks",
        ),
    ],
)
def test_starts_that_a_router_cannot_have_are_refused(start, kind, form, message):
    with pytest.raises(ConfigError, match=message):
        check_start(start, kind, form)
