//! Packed task vectors and sweeps: sizes, rates, and what sharing reads saves.

use std::io;
use std::path::Path;
use std::process::Command;

use super::{Bench, child, median, seconds};

impl Bench {
    /// Packing, unpacking, merging what is packed; and a sweep beside separate merges.
    pub fn packed(&self) -> io::Result<()> {
        let data = self.data("family", self.shape(), 3)?;
        let threads = self.options.threads.to_string();
        let (base, models) = data.checkpoints.split_first().expect("a base");
        let folder = self.dir.join("packed");
        std::fs::create_dir_all(&folder)?;
        let command = |verb: &str| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_tiesmith"));
            command.args([
                verb,
                "--memory",
                &self.options.memory,
                "--threads",
                &threads,
                "--json",
                "--progress",
                "json",
            ]);
            command
        };
        println!("### Packed task vectors: {:.2} billion parameters\n", data.shape.elements() as f64 / 1e9);
        println!("| what | ratio | wall, median (least) | checkpoint bytes / s |");
        println!("|---|---|---|---|");
        let row = |name: &str, ratio: f64, runs: &[child::Run]| {
            let walls: Vec<f64> = runs.iter().map(|run| run.wall).collect();
            let rate = 2e-6 * data.shape.elements() as f64 / median(&walls);
            let ratio = if ratio > 0.0 { format!("{ratio:.2}") } else { String::new() };
            println!("| {name} | {ratio} | {} | {rate:.0} MB/s |", seconds(&walls));
        };
        let file = |number: usize| folder.join(format!("{number}.tvz"));
        let pack = |model: &Path, out: &Path, flags: &[&str]| {
            let mut command = command("pack");
            command.arg(model).arg("--base").arg(base).arg("--out").arg(out).arg("--force").args(flags);
            child::run(&mut command)
        };
        let unpack = |file: &Path| {
            let mut command = command("unpack");
            command.arg(file).arg("--out").arg(&self.out);
            self.measure(&mut command)
        };
        let rounds = 0..self.options.runs;
        for density in ["1", "0.2"] {
            let packed: Vec<_> = rounds.clone().map(|_| pack(&models[0], &file(0), &["--density", density])).collect();
            let ratio = packed[0].report["ratio"].as_f64().unwrap_or_default();
            row(&format!("pack, density {density}"), ratio, &packed);
            let unpacked: Vec<_> = rounds.clone().map(|_| unpack(&file(0))).collect();
            row(&format!("unpack, density {density}"), 0.0, &unpacked);
        }
        for (number, model) in models.iter().enumerate() {
            pack(model, &file(number), &["--density", "0.2"]);
        }
        let mut merges: [Vec<child::Run>; 2] = Default::default();
        for _ in rounds.clone() {
            let packed: Vec<_> = std::iter::once(base.clone()).chain((0..models.len()).map(file)).collect();
            merges[0].push(self.run_merge(&packed, &["--density", "1"], self.options.threads));
            merges[1].push(self.run_merge(&data.checkpoints, &["--density", "0.2"], self.options.threads));
        }
        row("merge 3 packed at density 1", 0.0, &merges[0]);
        row("merge the 3 themselves at density 0.2", 0.0, &merges[1]);
        self.sweeps(&data.checkpoints)?;
        std::fs::remove_dir_all(folder)
    }

    fn sweeps(&self, checkpoints: &[std::path::PathBuf]) -> io::Result<()> {
        let (densities, lambdas) = (["0.1", "0.2"], ["0.8", "1.0", "1.2", "1.4", "1.6", "1.8"]);
        let grid = ["--density", &densities.join(","), "--lambda", &lambdas.join(",")];
        println!("\n### A sweep of {} densities and {} lambdas\n", densities.len(), lambdas.len());
        println!("| what | wall, median (least) | read |");
        println!("|---|---|---|");
        let row = |name: &str, walls: &[f64], read: u64| {
            println!("| {name} | {} | {:.2} GB |", seconds(walls), read as f64 / 1e9);
        };
        let sweep = |flags: &[&str]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_tiesmith"));
            command.arg("sweep").arg("--out").arg(&self.out).args(["--progress", "json"]);
            self.inputs(&mut command, checkpoints, &[&grid[..], flags].concat(), self.options.threads);
            self.measure(&mut command)
        };
        for (name, flags) in [("sweep", &[][..]), ("sweep, packed", &["--packed"])] {
            let runs: Vec<child::Run> = (0..self.options.runs).map(|_| sweep(flags)).collect();
            row(name, &runs.iter().map(|run| run.wall).collect::<Vec<_>>(), runs[0].number("bytes_read"));
        }
        let (mut walls, mut read) = (Vec::new(), 0);
        for _ in 0..self.options.runs {
            let (mut wall, mut bytes) = (0.0, 0);
            for density in densities {
                for lambda in lambdas {
                    let flags = ["--density", density, "--lambda", lambda];
                    let run = self.run_merge(checkpoints, &flags, self.options.threads);
                    (wall, bytes) = (wall + run.wall, bytes + run.number("bytes_read"));
                }
            }
            walls.push(wall);
            read = bytes;
        }
        row("separate merges", &walls, read);
        println!();
        Ok(())
    }
}
