"""From an offline corpus, by way of PEAR-SFT, to a policy that RL has made better: on Ray."""

__version__ = "0.1.0"
