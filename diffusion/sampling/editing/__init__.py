"""Editing by name: methods that change the sampling, and not the model, so that samples agree with what is known.

    parts of an image are kept, by a mask         replacement, repaint
    a measurement A x + noise of an image         pigdm

A method is a module with `make(...) -> Editing`. What is known enters the compiled sampler as arguments, so that other
images, masks and strengths do not recompile it.
"""
