"""Real pictures out of Debian packages: a data set to train on, and a set to test on. Nothing is part of the checkout.

`grain-jax fetch fashion --output DIR` (package dataset-fashion-mnist, MIT: 70,000 photographs of clothes, shoes and
bags, 28 x 28 grey values, 10 classes) writes

  DIR/A.jsonl, images/                 training images of 8 classes with boxes and words of their parts
  DIR/seen/CLASS/*                     other images of these classes
  DIR/unseen/KIND/*, unseen.json       images of kinds that training never shows, and their descriptions
  DIR/test/A.jsonl, test/images/       images with boxes and words, no names; test/seen.jsonl and
                                       test/unseen.jsonl are its two halves (images below DIR/test)
  DIR/README.md, LICENSE, settings.json   settings.json is written last

which is what `python -m benchmarks.claim --data DIR` reads. `grain-jax fetch gcompris --output DIR` (package
gcompris-qt-data) writes class folders for `grain-jax evaluate zeroshot`; `gcompris` has the list.

Modules: `package` (download, files of a .deb), `parts` (boxes and words by measures), `fashion`, `resources` (files
of a Qt resource), `licences`, `gcompris`. docs/howto/real_pictures.md says what the sets can show and what not.
"""
