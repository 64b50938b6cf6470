"""The vision families as timm models; importing this package registers them."""

from allmlp.vision.asmlp import ASMLP
from allmlp.vision.gmlp import GMLP
from allmlp.vision.mixer import Mixer
from allmlp.vision.resmlp import ResMLP
from allmlp.vision.s2mlp import S2MLP
from allmlp.vision.s2mlpv2 import S2MLPv2
from allmlp.vision.vip import VisionPermutator

__all__ = ["ASMLP", "GMLP", "S2MLP", "Mixer", "ResMLP", "S2MLPv2", "VisionPermutator"]
