// node scenarios.mjs forty | conflict | die | resume TURN_ID | two

import { Turn, connect, rpc } from './turn.mjs'

const supabase = connect()
const project = process.env.PROJECT_ID
const save = (path, content) => rpc(supabase, 'upsert_project_file', { project_uuid: project, p_file_path: path, p_content: content })
const component = (n) => `export const Part${n} = () => <p>part ${n}</p>\n`
const say = (what) => process.stdout.write(JSON.stringify(what) + '\n')

const scenarios = {
  /** The page before its components, and the old page away: nobody sees a page without its parts. */
  async forty() {
    await save('src/Old.tsx', 'export const Old = () => null\n')
    const turn = await Turn.begin(supabase, project, 'A landing page')
    await turn.write('src/Page.tsx', "import { Part1 } from './parts/1'\n")
    for (let n = 1; n < 40; n++) await turn.write(`src/parts/${n}.tsx`, component(n))
    await turn.remove('src/Old.tsx')
    const { revision, changed } = await turn.end()
    return { turn: turn.id, revision, changed }
  },

  /** A person saves a file that the turn has written too. Both are kept. */
  async conflict() {
    await save('src/Page.tsx', 'line 1\n')
    const turn = await Turn.begin(supabase, project, 'A second line')
    await turn.write('src/Page.tsx', 'line 1\nline 2\n')
    await turn.write('src/New.tsx', 'new\n')
    await save('src/Page.tsx', 'line 0\nline 1\n')
    const asked = []
    const { revision } = await turn.end((path, mine, theirs) => {
      asked.push(path)
      return theirs + mine.slice('line 1\n'.length)
    })
    return { turn: turn.id, revision, asked }
  },

  /** Writes half of a turn and never comes back. */
  async die() {
    const turn = await Turn.begin(supabase, project, 'In two halves')
    for (let n = 1; n <= 20; n++) await turn.write(`src/parts/${n}.tsx`, component(n))
    say({ turn: turn.id })
    await new Promise((done) => setTimeout(done, 600_000))
  },

  /** Another process, with the turn's id alone, writes what is missing. The answer to the first end is lost. */
  async resume(id) {
    const turn = new Turn(supabase, project, id)
    const there = await turn.files()
    for (let n = 1; n <= 40; n++) {
      if (!there.has(`src/parts/${n}.tsx`)) await turn.write(`src/parts/${n}.tsx`, component(n))
    }
    await turn.end()
    const { revision, changed } = await turn.end()
    return { turn: turn.id, found: there.size, revision, changed }
  },

  /** Two writers, each with a turn of its own: two revisions, whichever ends first. */
  async two() {
    const ended = await Promise.all(
      ['left', 'right'].map(async (name) => {
        const turn = await Turn.begin(supabase, project, name)
        for (let n = 0; n < 10; n++) await turn.write(`src/${name}/${n}.tsx`, component(n))
        return { turn: turn.id, revision: (await turn.end()).revision }
      })
    )
    return { ended }
  },
}

const [name, ...args] = process.argv.slice(2)
say(await scenarios[name](...args))
