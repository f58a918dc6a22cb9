//! Every form of mergekit's recipe language (its configuration classes, in their order): one recipe that is accepted and
//! one that is refused, with the one line that says why.

use crate::support::place::Place;

/// A form of the language.
struct Form {
    what: &'static str,
    accepted: &'static str,
    refused: &'static str,
    /// What the refusal says, after "recipe.yml:".
    says: &'static str,
}

const fn form(what: &'static str, accepted: &'static str, refused: &'static str, says: &'static str) -> Form {
    Form { what, accepted, refused, says }
}

/// `TIES`: a ties merge of `a` on `base`, up to its parameters. `LINEAR`: an average of `a`.
const TIES: &str =
    "merge_method: ties\nbase_model: base\nmodels: [{model: a, parameters: {weight: 1, density: 0.5}}]\n";
const LINEAR: &str = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n";
const SLICE: &str = "merge_method: passthrough\nslices:\n- ";

#[rustfmt::skip]
const FORMS: &[Form] = &[
    // The document.
    form("merge_method", "TIES", "merge_method: tis\n", "1:15: unknown merge_method: \"tis\"; did you mean \"ties\"?"),
    form("models", "LINEAR", "merge_method: linear\nmodels: a\n", "2:9: models must be a list"),
    form("slices", "SLICEsources: [{model: a, layer_range: [0, 2]}]", "SLICEmodel: a", "3:3: unknown key in a slice: \"model\""),
    form("modules", "merge_method: linear\nmodules: {default: {models: [{model: a, parameters: {weight: 1}}]}}\n",
        "merge_method: linear\nmodules: [a]\n", "2:10: modules must be a mapping"),
    form("exactly one of the three", "LINEAR", "LINEARslices: []\n", "3:9: both 'models' and 'slices'"),
    form("none of the three", "LINEAR", "merge_method: linear\n", "1:1: neither 'models' nor 'slices'"),
    form("base_model", "TIES", "merge_method: ties\nmodels: [{model: a}]\n", "1:1: ties works on task vectors and needs"),
    form("parameters", "TIESparameters: {lambda: 0.5}", "TIESparameters: {lamda: 0.5}", "4:14: unknown parameter: \"lamda\""),
    form("dtype", "TIESdtype: bfloat16", "TIESdtype: float64", "4:8: unknown dtype: \"float64\""),
    form("dtype with its module", "TIESdtype: torch.float16", "TIESdtype: int64", "4:8: dtype int64"),
    form("out_dtype", "TIESout_dtype: float32", "TIESout_dtype: 16", "4:12: unknown out_dtype: \"16\""),
    form("tokenizer_source", "LINEARtokenizer_source: union", "LINEARtokenizer_source: [base]", "3:19: tokenizer source must be a text"),
    form("tokenizer", "LINEARtokenizer: {source: base}", "LINEARtokenizer: {origin: base}", "3:13: unknown key in tokenizer"),
    form("one of both tokenizers", "LINEARtokenizer_source: base", "LINEARtokenizer_source: base\ntokenizer: {source: base}", "4:12: both 'tokenizer_source' and"),
    form("chat_template", "LINEARchat_template: chatml", "LINEARchat_template: chatlm", "3:16: unknown chat_template: \"chatlm\"; did you mean \"chatml\"?"),
    form("chat_template as text", "LINEARchat_template: '{{ bos_token }}{{ messages }}'", "LINEARchat_template: '{{ x }}'", "3:16: unknown chat_template"),
    form("name", "LINEARname: one", "LINEARname: a/b", "3:7: \"a/b\" cannot be the name of a directory"),
    form("an unknown key", "TIES", "TIESpramaters: {}", "4:1: unknown key in a recipe: \"pramaters\"; did you mean \"parameters\"?"),
    form("a key given as nothing", "TIESdtype: null\nparameters:", "merge_method: ties\nbase_model:\nmodels: [{model: a}]\n", "1:1: ties works on task vectors"),
    // Models.
    form("an entry of models", "LINEAR", "merge_method: linear\nmodels: [{parameters: {weight: 1}}]\n", "2:10: an entry without 'model'"),
    form("an entry without parameters", "merge_method: passthrough\nmodels: [{model: a}]\n", "merge_method: passthrough\nmodels: [a]\n", "2:10: a model must be a mapping"),
    form("a model as a mapping", "merge_method: passthrough\nmodels: [{model: {model: a}}]\n", "merge_method: passthrough\nmodels: [{model: {modle: a}}]\n", "2:19: unknown key in model: \"modle\""),
    form("path and revision", "merge_method: passthrough\nmodels: [{model: {model: {path: a}}}]\n", "merge_method: passthrough\nmodels: [{model: {model: {revision: main}}}]\n", "2:26: model without 'path'"),
    form("path@revision", "merge_method: passthrough\nmodels: [{model: a}]\n", "merge_method: passthrough\nmodels: [{model: org/none@v1}]\n", "org/none@v1"),
    form("lora", "merge_method: passthrough\nmodels: [{model: {model: a}}]\n", "merge_method: passthrough\nmodels: [{model: {model: a, lora: none}}]\n", "none"),
    form("override_architecture", "merge_method: passthrough\nmodels: [{model: {model: a, override_architecture: B}}]\n",
        "merge_method: passthrough\nmodels: [{model: {model: a, override_architecture: {}}}]\n", "2:52: override_architecture must be a text"),
    form("a model that is not there", "LINEAR", "merge_method: linear\nmodels: [{model: b, parameters: {weight: 1}}]\n", "b: no such file or directory, named in recipe.yml:2:18"),
    form("a model listed twice", "LINEAR", "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: a}]\n", "3:22: model \"a\" comes twice, first in line 3"),
    // Slices.
    form("sources", "SLICEsources: [{model: a, layer_range: [1, 2]}]", "SLICEparameters: {scale: 1}", "3:3: a slice without 'sources'"),
    form("layer_range", "SLICEsources: [{model: a, layer_range: [1, 2]}]", "SLICEsources: [{model: a}]", "3:13: a source without 'layer_range'"),
    form("layer_range is a pair", "SLICEsources: [{model: a, layer_range: [1, 2]}]", "SLICEsources: [{model: a, layer_range: 2}]", "3:37: layer_range must be a list"),
    form("layer_range is not empty", "SLICEsources: [{model: a, layer_range: [1, 2]}]", "SLICEsources: [{model: a, layer_range: [2, 1]}]", "3:37: layer_range [2, 1] holds no layer"),
    form("layers that are there", "SLICEsources: [{model: a, layer_range: [0, 2]}]", "SLICEsources: [{model: a, layer_range: [0, 3]}]", "3:37: layer_range [0, 3] of a, but \"model.layers\" has 2 layers"),
    form("equally many layers", "merge_method: linear\nparameters: {weight: 1}\nslices: [{sources: [{model: a, layer_range: [0, 1]}, {model: base, layer_range: [1, 2]}]}]\n",
        "merge_method: linear\nparameters: {weight: 1}\nslices: [{sources: [{model: a, layer_range: [0, 1]}, {model: base, layer_range: [0, 2]}]}]\n", "3:81: 2 layers, but the slice's first source has 1"),
    form("base_model of a slice", "merge_method: ties\nparameters: {weight: 1}\nslices: [{base_model: base, sources: [{model: a, layer_range: [0, 1]}]}]\n",
        "merge_method: ties\nparameters: {weight: 1}\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n", "1:1: ties works on task vectors and needs 'base_model'"),
    form("parameters of a slice", "SLICEsources: [{model: a, layer_range: [1, 2]}]\n  parameters: {scale: 2}", "SLICEsources: [{model: a, layer_range: [1, 2]}]\n  parameters: {scael: 2}", "4:16: unknown parameter: \"scael\""),
    form("parameters of a source", "SLICEsources: [{model: a, layer_range: [1, 2], parameters: {scale: 2}}]", "SLICEsources: [{model: a, layer_range: [1, 2], parameters: 2}]", "3:57: parameters must be a mapping"),
    form("residual_weight", "SLICEsources: [{model: a, layer_range: [1, 2]}]\n  residual_weight: 1", "SLICEsources: [{model: a, layer_range: [1, 2], residual_weight: 1}]", "3:45: unknown key in a source: \"residual_weight\""),
    // Modules.
    form("a module", "merge_method: linear\nmodules: {a: {models: [{model: a, parameters: {weight: 1}}]}}\n", "merge_method: linear\nmodules: {a: {}}\n", "2:14: a module has either"),
    form("several modules", "merge_method: linear\nparameters: {weight: 1}\nmodules: {default: {models: [{model: a}]}, model.norm: {models: [{model: base}]}}\n",
        "merge_method: linear\nparameters: {weight: 1}\nmodules: {default: {models: [{model: a}]}, ears: {models: [{model: base}]}}\n", "3:44: no tensor is in the module \"ears\""),
    form("parameters of a module", "merge_method: linear\nmodules: {a: {models: [{model: a}], parameters: {weight: 1}}}\n", "merge_method: linear\nmodules: {a: {models: [{model: a}], parameters: {wieght: 1}}}\n", "2:50: unknown parameter: \"wieght\""),
    // Values.
    form("a number", "TIESparameters: {lambda: -1e-1}", "TIESparameters: {lambda: much}", "4:22: lambda must be a number, not \"much\""),
    form("a number in its range", "TIESparameters: {density: 0}", "TIESparameters: {density: 2}", "4:23: density is 2, but must lie between 0 and 1"),
    form("true and false", "TIESparameters: {normalize: false, int8_mask: true}", "TIESparameters: {normalize: perhaps}", "4:25: normalize must be true or false"),
    form("a gradient", "TIESparameters: {lambda: [0, 1]}", "TIESparameters: {lambda: [0, one]}", "4:26: lambda must be a number, not \"one\""),
    form("a gradient of switches", "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\nparameters: {normalize: [true, false]}", "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\nparameters: {normalize: [true, no way]}", "3:32: unknown normalize: \"no way\"; known are: true, false"),
    form("value and filter", "TIESparameters: {lambda: {filter: mlp, value: 2}}", "TIESparameters: {lambda: {filter: mlp}}", "4:22: a case of lambda without a value"),
    form("a list of cases", "TIESparameters: {lambda: [{filter: mlp, value: 2}, {value: 1}]}", "TIESparameters: {lambda: [{fliter: mlp, value: 2}]}", "4:24: unknown key in a case of lambda: \"fliter\""),
    form("a gradient in a case", "TIESparameters: {lambda: [{filter: '*', value: [1, 2]}]}", "TIESparameters: {lambda: [{filter: mlp, value: []}]}", "4:44: lambda is an empty list"),
    form("cases and numbers mixed", "TIESparameters: {lambda: [1, 2]}", "TIESparameters: {lambda: [1, {value: 2}]}", "4:26: a mapping in a gradient of lambda"),
    form("required parameters", "LINEAR", "merge_method: linear\nmodels: [{model: a}]\n", "linear needs the parameter weight, which is not given for model a"),
    form("rescale", "TIESparameters: {rescale: true}", "TIESparameters: {rescale: some}", "4:23: rescale must be true or false"),
    form("nuslerp's switches", "merge_method: nuslerp\nparameters: {weight: 1, nuslerp_flatten: false, nuslerp_row_wise: true}\nmodels: [{model: a}, {model: base}]\n",
        "merge_method: nuslerp\nparameters: {weight: 1, nuslerp_row_wise: columns}\nmodels: [{model: a}, {model: base}]\n", "2:43: unknown nuslerp_row_wise: \"columns\""),
    // Tokenizers.
    form("tokenizer source", "LINEARtokenizer: {source: union}", "LINEARtokenizer: {source: {}}", "3:21: tokenizer source without 'model'"),
    form("pad_to_multiple_of", "LINEARtokenizer: {pad_to_multiple_of: 8}", "LINEARtokenizer: {pad_to_multiple_of: 0}", "3:33: pad_to_multiple_of is 0"),
    form("tokens", "LINEARtokenizer: {tokens: {x: {source: a}}}", "LINEARtokenizer: {tokens: x}", "3:21: tokens must be a mapping"),
    form("a token's model", "LINEARtokenizer: {tokens: {x: {source: a, force: true}}}", "LINEARtokenizer: {tokens: {x: {source: c}}}", "3:34: the token source \"c\" is none of the models"),
    form("a token of a model", "LINEARtokenizer: {tokens: {x: {source: {kind: model_token, model: a, token: x}}}}",
        "LINEARtokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}", "3:34: a token source needs 'token' or 'token_id'"),
    form("a row of a model", "LINEARtokenizer: {tokens: {x: {source: {kind: model_token, model: a, token_id: 1}}}}",
        "LINEARtokenizer: {tokens: {x: {source: {kind: model_token, model: a, token_id: one}}}}", "3:74: token_id must be a whole number"),
    form("zeros", "LINEARtokenizer: {tokens: {x: {source: {kind: zero}}}}", "LINEARtokenizer: {tokens: {x: {source: {kind: zeros}}}}", "3:41: unknown kind: \"zeros\""),
    form("a token that its source has", "LINEARtokenizer: {tokens: {x: {source: {kind: model_token, model: a, token: x}}}}",
        "LINEARtokenizer: {tokens: {z: {source: {kind: model_token, model: a, token: y}}}}", "3:22: token \"z\": a has no token \"y\""),
    form("a row that its source has", "LINEARtokenizer: {tokens: {x: {source: {kind: model_token, model: a, token_id: 5}}}}",
        "LINEARtokenizer: {tokens: {z: {source: {kind: model_token, model: a, token_id: 77}}}}", "3:22: token \"z\": \"lm_head.weight\" has no row 77"),
    // Documents.
    form("several documents", "name: one\nLINEAR---\nmerge_method: linear\nmodels: [{model: one, parameters: {weight: 1}}]\n", "LINEAR---\nLINEAR", "a second document without a name"),
    form("an order of documents", "merge_method: linear\nmodels: [{model: one, parameters: {weight: 1}}]\n---\nname: one\nLINEAR", "name: one\nmerge_method: linear\nmodels: [{model: one, parameters: {weight: 1}}]\n---\nLINEAR", "from its own output"),
    // YAML itself.
    form("anchors and aliases", "merge_method: linear\nmodels:\n- {model: a, parameters: &p {weight: 1}}\n- {model: base, parameters: *p}\n", "merge_method: *m\n", "1:15: not valid YAML"),
    form("keys once", "TIES", "TIESmerge_method: ties\n", "4:1: key \"merge_method\" comes twice, first in line 1"),
];

#[test]
fn every_form_of_the_language_is_accepted_and_its_mistakes_are_refused() {
    let place = Place::new();
    for (seed, name) in [(1, "base"), (2, "a")] {
        place.model(name, 2, seed);
        place.write(
            &format!("{name}/tokenizer.json"),
            r#"{"model": {"vocab": {"u": 0, "v": 1, "w": 2, "x": 3, "s": 4, "t": 5}}}"#,
        );
    }
    let written = |text: &str| text.replace("TIES", TIES).replace("LINEAR", LINEAR).replace("SLICE", SLICE);
    let mut wrong = Vec::new();
    for Form { what, accepted, refused, says } in FORMS {
        place.write("recipe.yml", &written(accepted));
        let outcome = place.tiesmith(&["plan", "recipe.yml"]);
        if outcome.code != Some(0) {
            wrong.push(format!("{what}: refused, but it is right: {}", outcome.stderr));
        }
        place.write("recipe.yml", &written(refused));
        let outcome = place.tiesmith(&["plan", "recipe.yml"]);
        let line = outcome.stderr.trim_end();
        let right =
            outcome.code == Some(2) && line.starts_with("error: ") && line.lines().count() == 1 && line.contains(says);
        if !right {
            wrong.push(format!("{what}: expected \"{says}\", not ({:?}) {line}", outcome.code));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
