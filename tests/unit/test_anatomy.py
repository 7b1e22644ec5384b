import pytest

from panfm.anatomy import DEFAULT_ORGANS, Modality, parse_stream


@pytest.mark.parametrize("organ", [*DEFAULT_ORGANS, "chest", "left-lung", "l4-vertebra"])
@pytest.mark.parametrize("modality", Modality)
def test_a_stream_is_organ_and_modality(organ, modality):
    assert parse_stream(f"{organ}-{modality}") == (organ, modality)


@pytest.mark.parametrize(
    "name", ["", "-", "mr", "-mr", "brain", "brain-", "brain-mri", "Brain-mr", "brain-MR", "brain mr", "brain--mr",
             "brain_mr", "brain-mr ", "brain-mr\n", "4brain-mr", "../x-mr", "brain.x-mr"],
)  # fmt: skip
def test_what_is_no_stream(name):
    with pytest.raises(ValueError, match="expected <organ>-<modality> in lower case"):
        parse_stream(name)
