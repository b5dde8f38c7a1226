"""The head: the layer, its linear branches, and what each variant of it is trained on."""

from tf_dropmax.head.layer import DropMaxHead

__all__ = ["DropMaxHead"]
