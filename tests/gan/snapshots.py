"""Writes snapshots in the official layout, honest and hostile ones, for tests."""

import collections
import pickle
import sys
import types

from ovcalib.gan import stylegan2

NAMES = {"ToRGB": "ToRGBLayer", "FullyConnected": "FullyConnectedLayer", "Convolution": "Conv2dLayer"}


def _reconstruct_persistent_obj(meta) -> None:
    raise AssertionError("only its name is pickled")


class EasyDict(dict[str, object]):
    pass


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
EasyDict.__module__ = "dnnlib.util"


class Persistent:
    """An object that pickles as the official code's networks do."""

    def __init__(self, meta) -> None:
        self.meta = meta

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


class Call:
    """Pickles as the application of a function."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def record(module, version=6, kwargs=None, source="raise SystemExit('the source was executed')"):
    state = {
        "training": False, "_parameters": dict(module._parameters), "_buffers": dict(module._buffers),
        "_non_persistent_buffers_set": set(), "_backward_hooks": collections.OrderedDict(), "_init_args": (),
        "_init_kwargs": EasyDict(kwargs or {}),
        "_modules": {name: record(child, version, None, source) for name, child in module._modules.items()},
    }  # fmt: skip
    class_name = type(module).__name__
    return Persistent({"type": "class", "version": version, "module_src": source,
                       "class_name": NAMES.get(class_name, class_name), "state": state})  # fmt: skip


def generator_kwargs(config, **changed):
    synthesis = {
        "channel_base": config.channel_base,
        "channel_max": config.channel_max,
        "num_fp16_res": 4,
        "conv_clamp": 256,
    }
    return {"z_dim": config.z_dim, "c_dim": config.c_dim, "w_dim": config.w_dim, "img_resolution": config.img_resolution,
            "img_channels": config.img_channels, "mapping_kwargs": EasyDict(num_layers=config.num_layers),
            "synthesis_kwargs": EasyDict(synthesis), **changed}  # fmt: skip


def dumps(content, protocol=4):
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    vars(persistence)["_reconstruct_persistent_obj"] = _reconstruct_persistent_obj
    vars(util)["EasyDict"] = EasyDict
    fakes = {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": persistence,
             "dnnlib": types.ModuleType("dnnlib"), "dnnlib.util": util}  # fmt: skip
    sys.modules.update(fakes)
    try:
        return pickle.dumps(content, protocol)
    finally:
        for name in fakes:
            del sys.modules[name]


def tiny_config(**changed):
    return stylegan2.GeneratorConfig(**{
        "z_dim": 8, "w_dim": 6, "c_dim": 3, "img_resolution": 8, "channel_base": 64, "channel_max": 4, **changed,
    })  # fmt: skip
