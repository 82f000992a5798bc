"""The check of an export as planned: what it reads at once, by hand and in a file of that size."""

import pytest
from plan_models import OTHER, SMALL, make_model

from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.planning.export import export_check
from nexus_ds.runtime.export_check import PROBE_TOKENS, bytes_at_once


@pytest.mark.parametrize("sizes", [SMALL, OTHER], ids=["tied", "own output layer"])
def test_the_planned_bytes_are_those_of_the_files(tmp_path, sizes):
    reader = TensorReader(make_model(tmp_path / "model", sizes))
    logits = 2 * 4 * PROBE_TOKENS * sizes.vocabulary
    planned = export_check(sizes, 4)
    assert planned.gpu_bytes == bytes_at_once(reader, logits)
    largest = max(reader.info(name).end - reader.info(name).start for name in reader.names())
    assert planned.host_bytes == 2 * largest + 3 * logits
    total = sum(reader.info(name).end - reader.info(name).start for name in reader.names())
    assert planned.seconds == pytest.approx(total / 2e8)
