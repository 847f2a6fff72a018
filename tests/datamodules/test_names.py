"""Class names: lists, strings and files, and their folders."""

import random

import open_clip
import pytest
import yaml
from timm.data import ImageNetInfo

from metatpt.datamodules.names import match_folders, quote_class_names, quote_entries, read_class_names

IMAGENET = list(open_clip.IMAGENET_CLASSNAMES)
SYNSETS = ImageNetInfo().label_names()


def write(path, lines, encoding="utf-8"):
    path.write_text("\n".join(lines), encoding=encoding)
    return str(path)


# Without folders


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("cat,dog", ["cat", "dog"]),
        (" cat , wild dog", ["cat", "wild dog"]),
        ("cat", ["cat"]),
        ("1,yes,null", ["1", "yes", "null"]),
        (["cat", "dog, hot"], ["cat", "dog, hot"]),
        ([1, "yes"], ["1", "yes"]),
        ("AC/DC,Dr. No", ["AC/DC", "Dr. No"]),
    ],
)
def test_lists_and_strings(given, names):
    assert read_class_names(given) == names


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_file(tmp_path, encoding):
    lines = ["", "  cat ", "Löwe", "", "1", "yes", "null", "dog, hot", "\ttwo words", ""]
    path = write(tmp_path / "names.txt", lines, encoding)
    assert read_class_names(path) == ["cat", "Löwe", "1", "yes", "null", "dog, hot", "two words"]


def test_windows_line_ends(tmp_path):
    (tmp_path / "names").write_bytes(b"cat\r\ndog\r\n")
    assert read_class_names(str(tmp_path / "names")) == ["cat", "dog"]


def test_file_by_synset_without_folders(tmp_path):
    path = write(tmp_path / "names.txt", ["n02 not a synset"])
    assert read_class_names(path) == ["n02 not a synset"]
    path = write(tmp_path / "names.txt", ["n04509417 unicycle", "n01440764 tench", "n01443537\tgold fish"])
    assert read_class_names(path) == ["tench", "gold fish", "unicycle"]


@pytest.mark.parametrize("given", ["names.txt", "no/such/file", "./names", "cat,names.txt"])
def test_missing_file(given):
    with pytest.raises(FileNotFoundError, match=r"does not exist: expected a text file .*cat,dog"):
        read_class_names(given)


def test_folder_for_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_class_names(str(tmp_path))


@pytest.mark.parametrize("kind", ["list", "string", "file"])
def test_a_name_that_stands_twice(tmp_path, kind):
    names = ["cat", "dog", "cat"]
    given = {"list": names, "string": ",".join(names), "file": write(tmp_path / "names.txt", names)}[kind]
    for read in (read_class_names, lambda given: match_folders(given, ["cat", "dog"])):
        with pytest.raises(ValueError, match=r'"cat" stands twice in .*: at 0 and 2'):
            read(given)


@pytest.mark.parametrize("given", [[], ["cat", ""], "cat,,dog", ""])
def test_empty_names(given):
    with pytest.raises(ValueError, match=r"is empty|at least one"):
        read_class_names(given)


@pytest.mark.parametrize("entry", [True, None, 1.5, ["cat"]])
def test_what_yaml_made_of_text_is_refused(entry):
    with pytest.raises(ValueError, match=r"Class name 1 is .*quotes"):
        read_class_names(["cat", entry])


# With folders


def test_labels_go_by_name():
    assert match_folders(["dog", "cat"], ["cat", "dog"]) == (["dog", "cat"], {"cat": 1, "dog": 0})


def test_more_names_than_folders():
    names, labels = match_folders("zebra,dog,bird,cat", ["cat", "dog"])
    assert names == ["zebra", "dog", "bird", "cat"]
    assert labels == {"cat": 3, "dog": 1}


def test_case_and_underscores():
    names, labels = match_folders(["Hot Dog", "ice_cream"], ["Ice cream", "hot_dog"])
    assert names == ["Hot Dog", "ice_cream"]
    assert labels == {"Ice cream": 1, "hot_dog": 0}


def test_an_exact_name_comes_first():
    assert match_folders(["Cat", "cat"], ["cat", "Cat"])[1] == {"cat": 1, "Cat": 0}
    with pytest.raises(ValueError, match="none for 1 of them: CAT"):
        match_folders(["Cat", "cat"], ["CAT"])


def test_folder_without_a_name():
    with pytest.raises(
        ValueError, match=r"2 class names for 3 class folders, and none for 1 .*: catt \(nearest: cat\)"
    ):
        match_folders(["cat", "dog"], ["cat", "catt", "dog"])


def test_never_by_position():
    with pytest.raises(ValueError, match=r"never by position.*n01440764 some name"):
        match_folders(["tench", "goldfish"], ["n01440764", "n01443537"])


@pytest.mark.parametrize("n", [999, 1001])
def test_plain_file_of_another_length(tmp_path, n):
    path = write(tmp_path / "names.txt", [*IMAGENET, "one more"][:n])
    with pytest.raises(ValueError, match=f"{n} class names for 1000 class folders"):
        match_folders(path, SYNSETS)


def test_imagenet_by_synset_in_any_order(tmp_path):
    lines = [f"{synset} {name}" for synset, name in zip(SYNSETS, IMAGENET, strict=True)]
    random.Random(0).shuffle(lines)
    path = write(tmp_path / "names.txt", lines)
    names, labels = match_folders(path, SYNSETS)
    assert names == IMAGENET  # with its two pairs of equal names
    assert list(labels.values()) == list(range(1000))
    names, labels = match_folders(path, SYNSETS[10:20])  # a subset on disk: the choice stays among all
    assert names == IMAGENET
    assert list(labels.values()) == list(range(10, 20))
    assert read_class_names(path) == IMAGENET


def test_a_synset_that_stands_twice(tmp_path):
    path = write(tmp_path / "names.txt", ["n01440764 tench", "n01443537 goldfish", "n01440764 tench"])
    with pytest.raises(ValueError, match='"n01440764" stands twice'):
        match_folders(path, ["n01440764", "n01443537"])


def test_file_by_folder_of_any_names(tmp_path):
    path = write(tmp_path / "names.txt", ["b2 a dog", "a1\tcat", "c3 a dog"])
    assert match_folders(path, ["a1", "b2", "c3"]) == (["cat", "a dog", "a dog"], {"a1": 0, "b2": 1, "c3": 2})


def test_file_by_folder_without_a_line_for_one(tmp_path):
    path = write(tmp_path / "names.txt", ["a1 cat", "b2 dog", "c3 cow"])
    with pytest.raises(ValueError, match=r"\(3 lines\), but has no line for 1 of 4 class folders: c4 \(nearest: c3\)"):
        match_folders(path, ["a1", "b2", "c3", "c4"])


def test_names_of_two_words_are_not_taken_for_a_file_by_folder(tmp_path):
    path = write(tmp_path / "names.txt", ["hot dog", "ice cream"])
    assert match_folders(path, ["ice cream", "hot_dog"]) == (["hot dog", "ice cream"], {"ice cream": 1, "hot_dog": 0})


# Text in YAML


@pytest.mark.parametrize(
    "text",
    [
        "data:\n  init_args:\n    class_names: [1, yes, null, cat, 010, 1.50, ~, 2020-01-01, 'no', \"on\", a b]\n",
        "data:\n  init_args:\n    class_names:\n    - 1\n    - yes\n    - null\n    - cat\n    - 010\n    - 1.50 # c\n"
        "    - ~\n    - 2020-01-01\n    - 'no'\n    - \"on\"\n    - a b\n",
        "data: {init_args: &a {class_names: [1, yes, null, cat, 010, 1.50, ~, 2020-01-01, no, on, a b]}}\nb: *a\n",
    ],
)
def test_entries_keep_their_text(text):
    read = yaml.safe_load(quote_class_names(text))
    expected = ["1", "yes", "null", "cat", "010", "1.50", "~", "2020-01-01", "no", "on", "a b"]
    assert read["data"]["init_args"]["class_names"] == expected


def test_other_lists_are_left():
    text = "trainer: {devices: [0, 1]}\ndata.class_names: [1]\nclass_names: names.txt\nx: [{class_names: [no]}, yes]\n"
    read = yaml.safe_load(quote_class_names(text))
    assert read == {
        "trainer": {"devices": [0, 1]},
        "data.class_names": ["1"],
        "class_names": "names.txt",
        "x": [{"class_names": ["no"]}, True],
    }
    for broken in ("[1, yes", "a: b: c", "", "cat,dog", "null"):
        assert quote_class_names(broken) == broken
        assert quote_entries(broken) == broken


def test_many_names_with_commas_are_no_path():
    names = [f"class number {number}" for number in range(500)]
    assert read_class_names(",".join(names)) == names
