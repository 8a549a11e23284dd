"""`exfm demo`: the whole loop on KuaiRand-Pure, with and without distillation."""
