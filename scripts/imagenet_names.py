"""Print `synset name` for ImageNet's 1000 classes: a file for `--data.class_names`, from open_clip and timm."""

import open_clip
from timm.data import ImageNetInfo


def main() -> None:
    """One line a class, in the order of the labels."""
    info = ImageNetInfo()
    for number, name in enumerate(open_clip.IMAGENET_CLASSNAMES):
        print(info.index_to_label_name(number), name)


if __name__ == "__main__":
    main()
