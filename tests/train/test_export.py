"""Model cards say what a model learned from, and whose that is."""

from benthic.recipes import find_recipe
from benthic.train.export import Facts, card, parameter_count

FACTS = Facts("the standard library of Python 3.11.7 (500 files, PSF-2.0)", "abc123", 7, 1234567, {"val_loss": 1.23456})


def test_a_card_names_the_corpus_its_fingerprint_its_licence_and_the_numbers():
    text = card(find_recipe("demo")(), FACTS)
    assert "Trained on the standard library of Python 3.11.7" in text
    assert "`abc123`" in text
    assert "Python Software Foundation License Version 2" in text
    assert "| training tokens | 1,234,567 |" in text
    assert "| val_loss | 1.235 |" in text


def test_only_text_of_the_foundation_carries_its_notice():
    assert "Python Software Foundation" not in card(find_recipe("tiny")(), FACTS)


def test_a_card_says_where_the_run_began():
    config = find_recipe("tiny")()
    assert "trained with benthic from random weights." in card(config, FACTS)
    data = config.data.replace(tokenizer="models/Moonlight")
    continued = card(config.replace(data=data, start_from="models/Moonlight"), FACTS)
    assert "trained with benthic from the weights of Moonlight." in continued
    assert "random" not in continued
    assert "no instruction tuning" not in continued


def test_parameters_leave_routing_biases_out():
    model = find_recipe("demo")().model
    with_biases = parameter_count(model) + (model.num_expert_layers + 1) * model.n_routed_experts
    from benthic.config.manifest import parameters

    assert sum(row.size for row in parameters(model)) == with_biases
