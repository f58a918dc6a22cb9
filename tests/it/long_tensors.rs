//! Tensors that are units of their own and too long for memory, on the network: what is downloaded of them for one pass is
//! there for the next.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use safetensors::Dtype;
use serde_json::Value;

use crate::far::numbers;
use crate::remote::{Remote, content_bytes, hf, lasting, must_be_about, requests};
use crate::spool::{Running, input_bytes, outputs, passes, spec, spool_in};
use crate::support::family::{Deltas, Spec, text};
use crate::support::run::{Outcome, tiesmith};

type Name<'a> = &'a dyn Fn(&str) -> String;

/// `VERB` with a method on as many models as it takes.
fn run_by(remote: &Remote, verb: &str, method: &Value, name: Name<'_>, flags: &[&str]) -> Outcome {
    let most = method["models"]["max"].as_u64().unwrap_or(3).min(3);
    let models: Vec<String> = (1..=most).map(|number| name(&format!("model{number}"))).collect();
    let base = name("base");
    let mut args = vec![verb, "--progress=none", "--json", "--method", method["name"].as_str().unwrap()];
    if method["needs_base"] == true {
        args.extend(["--base", &base]);
    }
    models.iter().for_each(|model| args.extend(["--model", model]));
    remote.run(&[&args[..], flags].concat())
}

fn local(remote: &Remote) -> impl Fn(&str) -> String + use<> {
    let dir = remote.saved.dir.path().to_owned();
    move |name| text(&dir.join(name))
}

/// A family with a tensor that is too long for the little memory that it is merged in.
fn remote(seed: u64) -> Remote {
    let shapes = vec![("a", vec![1500, 1000]), ("b", vec![20_001]), ("c", vec![3])];
    let bf16 = Dtype::BF16;
    Remote::of(&Spec { shapes, ..spec(seed, bf16, &[bf16, Dtype::F32, bf16], Deltas::HeavyTailed) })
}

/// So much memory holds no copy of the tensor, in merges that search for thresholds and in others.
const SEARCHING: [&str; 3] = ["--memory=52MB", "--threads=2", "--scope=tensor"];
const LOOKING: [&str; 2] = ["--memory=44MB", "--threads=2"];
const SWEEPING: [&str; 5] =
    ["--memory=72MB", "--threads=2", "--scope=tensor", "--density=0.1,0.3", "--trim-ties=lowest"];
const ANALYZING: [&str; 3] = ["--memory=96MB", "--threads=2", "--scope=tensor"];

#[test]
fn methods_that_look_at_a_tensor_first_download_it_once() {
    let remote = remote(71);
    let (local, dir) = (local(&remote), tempfile::tempdir().unwrap());
    let methods = tiesmith(["methods", "--json"]).succeeded().json();
    let mut looked = 0;
    for method in methods["methods"].as_array().unwrap() {
        let name = method["name"].as_str().unwrap();
        let l1 = "--param=rescale=l1";
        // Fisher information and Gram matrices are other inputs, and nothing looks at them first.
        let ways: &[&[&str]] = match name {
            "fisher" | "regmean" => continue,
            "nuslerp" => &[&[], &["--param=nuslerp_flatten=false"]],
            "sce" => &[&[], &["--param=select_topk=0.3"]],
            "ties" => &[&[l1, "--trim-ties=lowest", "--zero-sum=majority"]],
            "breadcrumbs" | "dare_ties" | "della_linear" => &[&[l1]],
            _ => &[&[]],
        };
        for (way, at) in ways.iter().zip(0..) {
            let searches = method["trims"] == true && method["draws"] == false;
            let memory = if searches { &SEARCHING[..] } else { &LOOKING };
            let flags = [memory, way].concat();
            remote.hub.log();
            let plan = run_by(&remote, "plan", method, &hf, &flags).succeeded().json();
            let gathers = plan["passes"].as_array().unwrap().iter().any(|pass| pass["name"] == "gather");
            if !gathers {
                continue;
            }
            looked += 1;
            let planning = remote.hub.log();
            let heads = content_bytes(&planning);
            let (planned, spared) = (passes(&plan, "bytes_downloaded"), passes(&plan, "bytes_spared"));
            assert!(
                plan["spool_bytes"].as_u64().is_some_and(|bytes| bytes > 0) && spared > 0,
                "{name} {way:?}: {plan}"
            );
            let [here, there] = ["here", "there"].map(|place| text(&dir.path().join(format!("{name}{at}{place}"))));
            run_by(&remote, "merge", method, &local, &[&flags[..], &["--out", &here]].concat()).succeeded();
            let outcome = run_by(&remote, "merge", method, &hf, &[&flags[..], &["--out", &there]].concat()).succeeded();
            let log = remote.hub.log();
            let read = content_bytes(&log);
            must_be_about(&log, requests(&planning), &plan);
            assert_eq!(lasting(Path::new(&there)), lasting(Path::new(&here)), "{}", outcome.command);
            assert!(!Path::new(&there).join(".tiesmith").exists());
            assert!(
                read <= planned + heads && read + heads >= planned,
                "{way:?}: {read} bytes, {planned} planned, {heads}"
            );
            if let Some(peak) = outcome.json()["peak_memory_bytes"].as_u64() {
                let most = if searches { 52_000_000 } else { 44_000_000 };
                assert!(peak <= most, "{peak} bytes resident: {}", outcome.command);
            }
            // Without a spool every pass downloads everything, and the plan says so.
            let plan = run_by(&remote, "plan", method, &hf, &[&flags[..], &["--spool=none"]].concat());
            let plan = plan.succeeded().json();
            assert_eq!((passes(&plan, "bytes_spared"), plan.get("spool_bytes")), (0, None), "{way:?}");
            assert_eq!(passes(&plan, "bytes_downloaded"), planned + spared, "{name} {way:?}: {plan}");
        }
    }
    assert!(looked >= 13, "{looked} ways of merging look at tensors first");
}

#[test]
fn outputs_of_a_sweep_download_a_long_tensor_once() {
    let remote = remote(72);
    let (local, once) = (local(&remote), input_bytes(&remote));
    let grids: [&[&str]; 4] = [
        &[&SWEEPING[..], &["--zero-sum=majority", "--spool=."]].concat(),
        &[&SWEEPING[..], &["--density=0.2,1", "--lambda=0.5,1", "--threshold=sketch"]].concat(),
        &[&SWEEPING[..], &["--packed"]].concat(),
        // One that is made by itself.
        &[&LOOKING[..], &["--method=sce", "--lambda=1"]].concat(),
    ];
    for flags in grids {
        let dir = tempfile::tempdir().unwrap();
        let (here, there) = (dir.path().join("here"), dir.path().join("there"));
        let out = text(&there);
        remote.merge("sweep", &local, &[flags, &["--out", &text(&here)]].concat()).succeeded();
        remote.hub.log();
        let outcome = remote.merge("sweep", &hf, &[flags, &["--out", &out]].concat()).succeeded();
        let read = content_bytes(&remote.hub.log());
        let (found, wanted) = (outputs(&there), outputs(&here));
        match flags.contains(&"--packed") {
            // Their heads name base.
            true => assert!(found.keys().eq(wanted.keys()), "{}", outcome.command),
            false => assert_eq!(found, wanted, "{}", outcome.command),
        }
        assert!(spool_in(&there).is_none() && spool_in(&remote.saved.path("base")).is_none());
        if let Some(peak) = outcome.json()["peak_memory_bytes"].as_u64() {
            assert!(peak <= 72_000_000, "{peak} bytes resident: {}", outcome.command);
        }
        assert!(read < once + once / 4, "{read} bytes downloaded, {once} once: {}", outcome.command);
        if flags.contains(&"--packed") {
            continue;
        }
        let without = [flags, &["--spool=none", "--force", "--out", &out]].concat();
        remote.merge("sweep", &hf, &without).succeeded();
        let twice = content_bytes(&remote.hub.log());
        assert!(twice > once * 3 / 2, "{twice} bytes downloaded without: {}", outcome.command);
    }
}

#[test]
fn a_look_at_models_downloads_a_long_tensor_once() {
    let remote = remote(73);
    let (local, once) = (local(&remote), input_bytes(&remote));
    let dir = tempfile::tempdir().unwrap();
    for (turn, more) in [&[][..], &["--densities=0.2,1"]].into_iter().enumerate() {
        let flags = [&ANALYZING[..], more].concat();
        let [here, there] = ["here", "there"].map(|place| dir.path().join(format!("{place}{turn}")));
        let out = text(&there);
        remote.merge("analyze", &local, &[&flags[..], &["--out", &text(&here)]].concat()).succeeded();
        remote.hub.log();
        let outcome = remote.merge("analyze", &hf, &[&flags[..], &["--out", &out]].concat()).succeeded();
        let read = content_bytes(&remote.hub.log());
        assert_eq!(numbers(&there), numbers(&here), "{}", outcome.command);
        assert!(!there.join(".tiesmith").exists());
        assert!(read < once + once / 4, "{read} bytes downloaded, {once} once: {}", outcome.command);
        assert!(outcome.stderr.contains("are kept on the disk"), "{}", outcome.stderr);
        if let Some(peak) = outcome.json()["peak_memory_bytes"].as_u64() {
            assert!(peak <= 96_000_000, "{peak} bytes resident: {}", outcome.command);
        }
        let without = [&flags[..], &["--spool=none", "--force", "--out", &out]].concat();
        remote.hub.log();
        let outcome = remote.merge("analyze", &hf, &without).succeeded();
        let twice = content_bytes(&remote.hub.log());
        assert!(twice > once * 3 / 2, "{twice} bytes downloaded without: {}", outcome.command);
        assert!(outcome.stderr.contains("are downloaded twice"), "{}", outcome.stderr);
    }
}

/// What of an output does not depend on how its inputs are named.
fn result(verb: &str, out: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    match verb {
        "analyze" => BTreeMap::from([(PathBuf::new(), serde_json::to_vec(&numbers(out)).unwrap())]),
        _ => outputs(out),
    }
}

#[test]
fn a_killed_run_goes_on_with_what_it_downloaded_of_a_long_tensor() {
    let remote = remote(74);
    let (dir, once) = (tempfile::tempdir().unwrap(), input_bytes(&remote));
    let works: [(&str, &[&str]); 4] = [
        ("merge", &[&SEARCHING[..], &["--on-shard=true"]].concat()),
        ("merge", &[&LOOKING[..], &["--method=sce"]].concat()),
        ("sweep", &SWEEPING),
        ("analyze", &ANALYZING),
    ];
    for (turn, (verb, flags)) in works.into_iter().enumerate() {
        let [whole, out] = ["whole", "out"].map(|name| dir.path().join(format!("{name}{turn}")));
        let (whole_path, path) = (text(&whole), text(&out));
        remote.merge(verb, &hf, &[flags, &["--out", &whole_path]].concat()).succeeded();
        let args = [flags, &["--out", &path]].concat();
        remote.hub.slow_down(Duration::from_millis(20));
        let mut command = remote.command();
        command.args([verb, "--progress=none", "--base", &hf("base")]).args(&args);
        ["model1", "model2", "model3"].iter().for_each(|model| _ = command.args(["--model", &hf(model)]));
        let mut running = Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let (begin, place) = (Instant::now(), if verb == "sweep" { out.clone() } else { out.join(".tiesmith") });
        while spool_in(&place).is_none_or(|(_, bytes)| bytes < once * 2 / 5) {
            let runs = running.0.try_wait().unwrap().is_none() && begin.elapsed() < Duration::from_secs(60);
            assert!(runs, "{verb} {flags:?}: no spool in {}", place.display());
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(running);
        remote.hub.slow_down(Duration::ZERO);
        let left = spool_in(&place);
        // What the killed run asked for is answered, and counted, after its end.
        while !remote.hub.log().is_empty() {
            std::thread::sleep(Duration::from_millis(100));
        }
        let outcome = remote.merge(verb, &hf, &args).succeeded();
        let read = content_bytes(&remote.hub.log());
        assert!(result(verb, &out) == result(verb, &whole), "{}", outcome.command);
        assert!(spool_in(&place).is_none() && !out.join(".tiesmith").exists(), "nothing is left");
        // It may have been over with the tensor, which then is not read again.
        let kept = left.map_or(once * 2 / 5, |(_, bytes)| bytes);
        // The sample of a tensor of this length is a tenth of it.
        assert!(read + kept / 2 < once + once / 9, "{verb}: {read} bytes again, {kept} kept of {once}");
    }
}
