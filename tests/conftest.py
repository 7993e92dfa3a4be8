"""Every test starts without reports of earlier ones: ``tpfuse.fuel`` counts over the reports of the process."""

import pytest


@pytest.fixture(autouse=True)
def no_reports_of_other_tests():
    import tpfuse

    tpfuse.clear_reports()
    yield
