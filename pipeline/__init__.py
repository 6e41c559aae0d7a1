"""The stages a person starts (pretrain, finetune, evaluate) and the training machinery behind them."""
