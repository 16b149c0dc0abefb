"""Triton kernels of norms, SwiGLU, losses, convolutions, KDA's decode step and maximum logits, interpreted."""

from tests.ops.interpreter import assert_equal_in_the_interpreter, patient


@patient
def test_the_kernels_equal_the_references_in_their_interpreter():
    assert_equal_in_the_interpreter("small_triton_cases")
