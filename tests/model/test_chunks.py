from nexus_ds.model.chunks import CHUNK_ELEMENTS, chunk_tokens


def test_a_chunks_logits_stay_below_the_bound_and_a_chunk_has_a_token_at_least():
    assert chunk_tokens(2**18) == CHUNK_ELEMENTS // 2**18 == 512
    assert chunk_tokens(CHUNK_ELEMENTS + 1) == 1
