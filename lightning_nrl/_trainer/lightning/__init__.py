"""What this package takes from Lightning, of whichever of its two packages a user has.

In: a trainer, a module, a callback of `pytorch_lightning` or of `lightning.pytorch`. Out: classes that stand for both
(`packages`), and what Lightning does not promise to keep (`private_parts`). Nothing else imports either package.
"""
