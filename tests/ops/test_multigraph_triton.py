"""The multigraph's Triton kernels in their interpreter, against the dense float64 oracle."""

from tests.ops.interpreter import assert_equal_in_the_interpreter, patient


@patient
def test_the_kernels_equal_the_oracle_in_their_interpreter() -> None:
    assert_equal_in_the_interpreter("multigraph_triton_cases")
