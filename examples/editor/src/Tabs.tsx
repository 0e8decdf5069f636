import { useShallow } from 'zustand/react/shallow'

import { closeFile, openFile, useProjectEditorStore as useStore } from './store.ts'

export function Tabs() {
  const { docs, active, others } = useStore(useShallow((state) => ({ docs: state.docs, active: state.active, others: state.others })))
  return (
    <div className="tabs" role="group" aria-label="Open files">
      {[...docs.values()].map((doc) => {
        const changed = doc.text !== doc.base
        return (
          <span key={doc.path} className={doc.path === active ? 'tab active' : 'tab'}>
            <button aria-current={doc.path === active} title={doc.path} onClick={() => openFile(doc.path)}>
              {doc.path.split('/').at(-1)}
              {others.has(doc.path) && <span className="others" title="open elsewhere, too"> +{others.get(doc.path)}</span>}
              {doc.saving ? ' …' : changed ? ' ●' : doc.gone ? ' (deleted)' : ''}
            </button>
            <button aria-label={`Close ${doc.path}`} onClick={() => closeFile(doc.path)}>×</button>
          </span>
        )
      })}
    </div>
  )
}
