"""The paper, one verb a file. Each stage has a `Config` and `run(config, run)`."""
