"""Data loaders for what researchers have on disk.

| what | call |
|---|---|
| the bundled 2,000 CIFAR-10 test images | `read_bundled()` |
| CIFAR-10 / CIFAR-100 as torchvision unpacks it | `read_cifar(root, "cifar10")` |
| CIFAR-10 as one ``.npz`` (`experiments.data.convert`) | `read_npz(path)` |
| CIFAR-10-C / CIFAR-100-C, ``<corruption>.npy`` | `read_cifar_c(folder, corruption, severity)` |
| ImageNet-C, ``<corruption>/<severity>/<class>/`` | `read_imagenet_c(root, corruption, severity)` |
| any ``<class>/<image>`` folder, ImageNet-R, -A, V2, Sketch | `read_folder(root, classes=...)` |
| pictures and a file of their labels, such as ImageNet's | `read_folder(root, labels=file)` |
| CIFAR-10.1, ``<name>_data.npy`` | `read_cifar_c(folder, name, 1)` |
| ``<domain>/<class>/<image>`` | `open_data(where)` |
| one of these, found out from the path | `open_data(where)` |

Each gives an object with ``len``, ``[i] -> ((3, H, W) uint8 tensor, int)``, `labels`, `classes`,
`index`, `subset` and `balanced`, which `tta.streams.build` takes. A file that is missing, short or
of the wrong shape raises `FileNotFoundError` or `ValueError` naming it.
"""

from experiments.data.bundled import read_bundled
from experiments.data.cifar import list_cifar_c, read_cifar, read_cifar_c, read_npz
from experiments.data.collection import Collection, default_severity, open_data
from experiments.data.folders import (
    FolderSet,
    label_order,
    list_imagenet_c,
    read_folder,
    read_imagenet_c,
)
from experiments.data.image_set import ImageSet, LabelledSet

__all__ = [
    "Collection",
    "FolderSet",
    "ImageSet",
    "LabelledSet",
    "default_severity",
    "label_order",
    "list_cifar_c",
    "list_imagenet_c",
    "open_data",
    "read_bundled",
    "read_cifar",
    "read_cifar_c",
    "read_folder",
    "read_imagenet_c",
    "read_npz",
]
