"""Models by reference: built-in networks, torchvision, timm, torch hub, files, the user's own."""

from ovcalib.models.load import Model as Model
from ovcalib.models.load import ModelOptions as ModelOptions
from ovcalib.models.load import list_models as list_models
from ovcalib.models.load import load_model as load_model
