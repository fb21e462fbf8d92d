"""The stages of the method (Zhou et al., arXiv 2311.02105), each from the artifacts of the one before.

align (`secvec.stages.align`: first use of a base that must learn to refuse) -> vector -> finetune -> infer.
"""
