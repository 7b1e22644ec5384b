import pytest

from panfm.anatomy import DEFAULT_ORGANS, Modality, module_name, parse_stream, stream_of_module


@pytest.mark.parametrize("organ", [*DEFAULT_ORGANS, "chest", "left-lung", "l4-vertebra"])
@pytest.mark.parametrize("modality", Modality)
def test_a_stream_is_organ_and_modality(organ, modality):
    assert parse_stream(f"{organ}-{modality}") == (organ, modality)


@pytest.mark.parametrize(
    "name", ["", "-", "mr", "-mr", "brain", "brain-", "brain-mri", "Brain-mr", "brain-MR", "brain mr", "brain--mr",
             "brain_mr", "brain-mr ", "brain-mr\n", "4brain-mr", "../x-mr", "brain.x-mr", "brain-mr.", "brain-mr.T1",
             "brain-mr.t1.t2", "brain-mr.t_1", "brain-mr.-t1", "brain-mr.t1-", ".t1", "brain-mr.t1\n"],
)  # fmt: skip
def test_what_is_no_stream(name):
    with pytest.raises(ValueError, match="expected <organ>-<modality> in lower case"):
        parse_stream(name)


@pytest.mark.parametrize("suffix", ["t1", "flair", "ses-02", "2", "acq-highres-run-1"])
def test_a_suffix_leaves_organ_and_modality_as_they_are(suffix):
    assert parse_stream(f"left-lung-mr.{suffix}") == ("left-lung", Modality.MR)


def test_no_two_streams_share_a_module_name():
    streams = ["brain-mr", "brain-mr.t1", "brain-mr.t1-2", "brain-mr.t1-ct", "brain-mr-t1-ct", "brain-mr-t1-mr.ct"]
    assert len({module_name(stream) for stream in streams}) == len(streams)
    assert all("." not in module_name(stream) for stream in streams)
    assert module_name("brain-mr") == "brain-mr"
    assert [stream_of_module(module_name(stream)) for stream in streams] == streams
