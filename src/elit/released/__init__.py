"""Published checkpoints as networks of this library: ELIT's own ELIT-SiT and SiT, and the original SiT and DiT.

Weights have licences of their own. ELIT's and DiT's allow no commercial use; none are part of this library.
"""

LICENCE = "published weights keep their own licence; ELIT's and DiT's are for non-commercial use only"
