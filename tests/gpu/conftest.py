"""What tests of several files on a GPU take."""

import pytest


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    """Each backend of KDA and its decode step with kernels."""
    return request.param
