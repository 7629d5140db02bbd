"""An edge device: everything beyond the base dependencies is refused."""

import sys

REFUSED = {"torch", "torchvision", "nncf", "onnx", "onnxscript", "onnxruntime", "datumaro", "scipy", "timm", "cv2",
           "safetensors", "sklearn", "pandas"}  # fmt: skip


class Refuse:
    def find_spec(self, name, path=None, target=None) -> None:
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {name!r} on this device", name=name)


sys.meta_path.insert(0, Refuse())
