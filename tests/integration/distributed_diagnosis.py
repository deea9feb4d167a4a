"""A diagnosis on two processes, for `test_diagnose_call.py`; plain `ddp` starts this script again.

python distributed_diagnosis.py FOLDER CHECKPOINT
"""

from __future__ import annotations

import sys
from pathlib import Path

from digit_models import Classifier, Digits, quiet_trainer

from lightning_nrl import diagnose

if __name__ == "__main__":
    folder, checkpoint = Path(sys.argv[1]), sys.argv[2]
    trainer = quiet_trainer(folder, devices=2, strategy="ddp")
    found = diagnose(trainer, Classifier(), datamodule=Digits(), ckpt_path=checkpoint)
    (folder / f"{trainer.global_rank}.json").write_text(found.to_json())
