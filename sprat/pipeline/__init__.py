"""The pipeline in one command: data → pre-train → SFT → RL → distil → INT4, each stage a run."""
