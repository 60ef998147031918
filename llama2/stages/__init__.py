"""The paper, one file per section. Each stage has a `Config` and `run(config, run)`; `launch` names them all."""
