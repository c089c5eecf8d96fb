"""thaw: fine-tune pretrained vision transformers, as far as a freezing policy lets them."""

import os

# How often a thread of torch looks for work before it sleeps (libgomp, read when torch is imported). By default 300,000
# times: two runs on the same cores then slow each other many times over; with 3,000 they share them.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from thaw.run.folders import register_resolvers

register_resolvers()  # a configuration can be resolved wherever thaw is imported
