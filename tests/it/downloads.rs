//! What `plan` says of downloads where inputs are more than models: what is computed from them, and what models have besides.

use safetensors::Dtype;

use crate::remote::{Remote, content_bytes, hf, lasting, must_be_about, requests};
use crate::spool::passes;
use crate::support::adapters::Adapter;
use crate::support::family::{Deltas, Spec, text};
use crate::support::files::{Layout, read_checkpoint, read_tree, write_checkpoint};
use crate::support::random::Random;
use crate::support::statistics::{fisher_of, gram_of};

/// A family whose first tensor does not fit into the little memory that it is merged in, and what its models have besides.
fn remote() -> Remote {
    let shapes = vec![("a.weight", vec![3_000, 400]), ("b", vec![200_001]), ("c", vec![3]), ("d", vec![500, 300])];
    let bf16 = Dtype::BF16;
    let remote = Remote::of(&Spec {
        seed: 81,
        shapes,
        base: bf16,
        models: vec![bf16, Dtype::F32, bf16],
        deltas: Deltas::HeavyTailed,
    });
    for (number, model) in (1..).zip(&remote.saved.models) {
        let tensors = read_checkpoint(model);
        for (kind, tensors) in [("fisher", fisher_of(&tensors)), ("gram", gram_of(&tensors))] {
            let name = format!("{kind}{number}");
            write_checkpoint(&remote.saved.path(&name), &tensors, Layout::SINGLE);
            remote.hub.add(&format!("org/{name}"), &remote.saved.path(&name));
        }
    }
    let mut random = Random::new(82);
    let adapter = Adapter::lora(8, 16.0).with(&mut random, "a", (400, 3_000), bf16);
    adapter.write(&remote.saved.path("lora"));
    remote.hub.add("org/lora", &remote.saved.path("lora"));
    remote.hub.add("org/signs", &remote.saved.signs);
    remote
}

/// How the program takes an input, and its name.
type Input = (&'static str, &'static str);

#[test]
fn what_models_have_besides_is_downloaded_as_the_plan_says() {
    let remote = remote();
    let here = |name: &str| text(&remote.saved.path(name));
    let models: [Input; 3] = [("model", "model1"), ("model", "model2"), ("model", "model3")];
    let fishers = [("fisher", "fisher1"), ("fisher", "fisher2"), ("fisher", "fisher3")];
    let grams = [("gram", "gram1"), ("gram", "gram2"), ("gram", "gram3")];
    let signs = [("base", "base"), ("sign-from", "signs")];
    let adapted = [("base", "base"), ("model", "base+lora"), ("model", "model1")];
    // Flags, inputs, and what of them is read in two passes and kept by none.
    let cases: [(&[&str], Vec<Input>, Option<&str>); 7] = [
        (&["--method=fisher"], [models, fishers].concat(), None),
        (&["--method=regmean", "--memory=60MB"], [models, grams].concat(), None),
        (&["--zero-sum=majority"], [&models[..], &signs].concat(), None),
        (&["--zero-sum=majority", "--scope=tensor"], [&models[..], &signs].concat(), None),
        (&["--param=rescale=l1", "--scope=tensor"], [&models[..], &signs].concat(), Some("signs")),
        (&["--method=task_arithmetic"], adapted.to_vec(), None),
        (&["--method=sce"], adapted.to_vec(), None),
    ];
    for (flags, inputs, twice) in &cases {
        let args = |verb: &str, name: &dyn Fn(&str) -> String| -> Vec<String> {
            let named = |spec: &str| spec.split('+').map(name).collect::<Vec<_>>().join("+");
            let inputs = inputs.iter().flat_map(|(kind, spec)| [format!("--{kind}"), named(spec)]);
            let run = [verb, "--json", "--progress=none", "--memory=52MB", "--threads=2"];
            run.iter().chain(*flags).map(|&arg| arg.to_owned()).chain(inputs).collect()
        };
        let run = |args: Vec<String>| remote.run(&args.iter().map(|arg| &**arg).collect::<Vec<_>>()).succeeded();
        let dir = tempfile::tempdir().unwrap();
        let to = |name: &str| ["--out".to_owned(), text(&dir.path().join(name))];
        run([args("merge", &here), to("near").to_vec()].concat());
        remote.hub.log();
        let plan = run(args("plan", &hf)).json();
        let planning = remote.hub.log();
        let outcome = run([args("merge", &hf), to("far").to_vec()].concat());
        let log = remote.hub.log();
        assert_eq!(lasting(&dir.path().join("far")), lasting(&dir.path().join("near")), "{}", outcome.command);
        let (heads, read) = (content_bytes(&planning), content_bytes(&log));
        let planned = passes(&plan, "bytes_downloaded");
        println!("{flags:?}: {read} bytes, {planned} planned, {heads} of heads");
        must_be_about(&log, requests(&planning), &plan);
        assert!(
            read <= planned + heads && read + heads >= planned,
            "{}: {read} bytes, {planned} planned",
            outcome.command
        );
        let of = |name: &str| -> u64 {
            let own = log.iter().filter(|request| request.content && request.path.contains(&format!("/org/{name}/")));
            own.map(|request| request.sent).sum()
        };
        if let Some(name) = twice {
            let files = read_tree(&remote.saved.path(name));
            let bytes = files.values().map(|content| content.len() as u64).sum::<u64>();
            assert!(of(name) > bytes * 3 / 2, "{name}: {} of {bytes} bytes", of(name));
        }
    }
}
