"""MDLM-DVD: a masked-diffusion drafter and a masked-diffusion verifier, any pair of them (see README.md)."""
