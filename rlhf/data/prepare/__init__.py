"""Texts prepared for pretraining: mended, filtered, masked, deduplicated, decontaminated, packed; with a data card.

Every text is read once by one process and treated on all cores (reading, treatment, workers), in this order:

    cleaning         encoding faults, line ends, control characters, Unicode, white space
    filters          by length, signs, lines, repetition, in the manner of Gopher
    decontamination  texts that share long runs of words with the evaluation's items
    personal data    masked
    duplicates       equal texts, then near duplicates by MinHash; across all sources
    packing          to tokens, each source as often as its weight says, with documents made of few-shot tasks

What a pass finds is on the disk before the next one begins. Memory doesn't grow with the corpus, but for a few bytes a
document; the result depends neither on the number of processes nor on where a run was killed.
"""
