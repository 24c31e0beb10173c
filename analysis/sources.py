"""What the method, the code and the statistics are taken from, as BibTeX.

Where only the first author is known to the project's own references, the entry says `and others`.
"""

BIBTEX = """\
@misc{yoshihara2026layers,
  author = {Kirato Yoshihara},
  title = {Different Layers, Different Manifolds: Module-Wise Weight-Space Geometry in Transformer
           Optimization},
  year = {2026},
  eprint = {2606.13276},
  archivePrefix = {arXiv},
  url = {https://github.com/kiratoyoshihara/module-wise-manifold-muon},
  note = {Workshop on Weight-Space Symmetries, ICML}
}

@misc{bernstein2025modular,
  author = {Bernstein, Jeremy},
  title = {Modular Manifolds},
  year = {2025},
  howpublished = {Thinking Machines Lab: Connectionism},
  url = {https://thinkingmachines.ai/blog/modular-manifolds/}
}

@misc{keigwin2025gram,
  author = {Keigwin and others},
  title = {Gram-Space Manifold Muon},
  year = {2025},
  howpublished = {Tilde Research blog post},
  url = {https://blog.tilderesearch.com/vignettes/gram-space},
  note = {Source of DGram}
}

@misc{jordan2024muon,
  author = {Keller Jordan and Yuchen Jin and Vlado Boza and Jiacheng You and Franz Cesista and Laker Newhouse
            and Jeremy Bernstein},
  title = {Muon: An optimizer for hidden layers in neural networks},
  year = {2024},
  url = {https://kellerjordan.github.io/posts/muon/}
}

@misc{amsel2025polar,
  author = {Noah Amsel and David Persson and Christopher Musco and Robert Gower},
  title = {The Polar Express: Optimal Matrix Sign Methods and Their Application to the Muon Algorithm},
  year = {2025},
  eprint = {2505.16932},
  archivePrefix = {arXiv}
}

@misc{radford2019language,
  author = {Radford and others},
  title = {Language models are unsupervised multitask learners},
  year = {2019},
  howpublished = {OpenAI blog 1 (8)},
  note = {GPT-2}
}

@misc{karpathy2022nanogpt,
  author = {Karpathy},
  title = {NanoGPT},
  year = {2022},
  url = {https://github.com/karpathy/nanoGPT}
}

@misc{gokaslan2019openwebtext,
  author = {Gokaslan and Cohen},
  title = {OpenWebText corpus},
  year = {2019},
  url = {http://Skylion007.github.io/OpenWebTextCorpus}
}

@misc{su2021roformer,
  author = {Jianlin Su and others},
  title = {RoFormer: Enhanced Transformer with Rotary Position Embedding},
  year = {2021},
  eprint = {2104.09864},
  archivePrefix = {arXiv}
}

@misc{ramapuram2024sigmoid,
  author = {Jason Ramapuram and others},
  title = {Theory, Analysis, and Best Practices for Sigmoid Self-Attention},
  year = {2024},
  eprint = {2409.04431},
  archivePrefix = {arXiv}
}

@misc{chen2016sublinear,
  author = {Tianqi Chen and Bing Xu and Chiyuan Zhang and Carlos Guestrin},
  title = {Training Deep Nets with Sublinear Memory Cost},
  year = {2016},
  eprint = {1604.06174},
  archivePrefix = {arXiv}
}

@misc{olmo2024furious,
  author = {{Team OLMo} and Pete Walsh and Luca Soldaini and others},
  title = {2 OLMo 2 Furious},
  year = {2024},
  eprint = {2501.00656},
  archivePrefix = {arXiv},
  note = {Source of the spike score}
}

@misc{allenai2024core,
  author = {{Allen Institute for AI}},
  title = {OLMo-core},
  year = {2024},
  url = {https://github.com/allenai/OLMo-core},
  note = {SkipStepOptimizer: source of the second spike score}
}

@misc{kimi2025k2,
  author = {{Kimi Team}},
  title = {Kimi K2: Open Agentic Intelligence},
  year = {2025},
  eprint = {2507.20534},
  archivePrefix = {arXiv}
}
"""
